"""Command lines with a configuration: `--config=FILE.py[:argument] --config.key=value --workdir=DIR`.

The semantics of `--config.key=value` are those of `ml_collections.config_flags` (typed by the default, `--config.on`,
`--noconfig.on`, tuples as `(1, 2)`); mistakes come out as a UserError of one line that names the key and a close match.
"""

import ast
import contextlib
import difflib
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import ConfigDict, config_flags

from greedy_distill_jax.cli.extensions import execute
from greedy_distill_jax.errors import UserError

CHECKOUT = Path(__file__).resolve().parents[2]


def load_config(
    argv: Sequence[str],
    extra_flags: dict[str, tuple[type, Any, str]],
    *,
    default: str | None = None,
    open_keys: Sequence[str] = (),
) -> tuple[ConfigDict, dict[str, Any]]:
    """Reads a configuration file, its overrides and a few more flags from a command line.

    Args:
      argv: arguments without the program's name.
      extra_flags: name -> (type, default, help) of other flags; types are str, int, float, bool and list
        (a flag that may be repeated).
      default: the configuration file used without `--config`; None makes `--config` required.
      open_keys: dotted paths below which keys may be added on the command line, such as
        `--config.losses.mine.weight=1`.

    Returns:
      The locked ConfigDict, and {name: value} of the other flags.

    Raises:
      UserError: what is wrong with the command line, in one line.
      SystemExit: after printing the help for `-h` or `--help`.
    """
    path, argv = _take_config_path(list(argv))
    values = flags.FlagValues()
    _define(values, extra_flags)
    if {"-h", "--help", "-help"} & set(argv):
        print(_usage(path or default, extra_flags))
        raise SystemExit(0)
    path = path or default
    if not path:
        raise UserError("--config is missing; name a configuration file, such as --config=configs/base.py.")
    config = read_config(path)
    argv = _add_open_keys(config, argv, open_keys)
    config.lock()
    _check_keys(config, argv)
    rest = _parse(values, config, argv, extra_flags)
    if rest:
        raise UserError(f"argument {rest[0]!r} is not understood; options start with --, such as --config.key=value.")
    return config, {name: values[name].value for name in extra_flags}


def read_config(path: str, option: str = "--config") -> ConfigDict:
    """Calls `get_config()` (or `get_config(argument)`) of `FILE.py` (or `FILE.py:argument`).

    A relative path is looked up in the current directory, then in the checkout the package lies in. Errors say that it
    came from ``option``.
    """
    name, colon, argument = path.partition(":")
    file = Path(name).expanduser()
    if not file.is_file() and not file.is_absolute() and (CHECKOUT / file).is_file():
        file = CHECKOUT / file
    if not file.is_file():
        what = "is a folder, not a configuration file" if file.is_dir() else "no such file"
        raise UserError(f"{option}={name}: {what}; configurations lie in {CHECKOUT / 'configs'}.")
    if file.suffix != ".py":
        raise UserError(f"{option}={name}: configurations are Python files, named .py; see configs/base.py.")
    file = file.resolve()
    with _mistakes_in(file, f"{option}={name}"):
        module = _load_module(file)
    if not hasattr(module, "get_config"):
        raise UserError(f"{option}={name}: the file defines no get_config(); see configs/base.py.")
    if not callable(module.get_config):
        found = type(module.get_config).__name__
        raise UserError(f"{option}={name}: get_config is a {found}, not a function; see configs/base.py.")
    try:
        with _mistakes_in(file, f"{option}={name}"):
            config = module.get_config(*([argument] if colon else []))
    except (ValueError, KeyError, TypeError) as error:
        if error.__traceback__ is not None and _raised_inside(error):
            raise
        raise UserError(f"{option}={path}: {_one_line(error)}") from error
    if not isinstance(config, ConfigDict):
        code = getattr(module.get_config, "__code__", None)
        line = f", line {code.co_firstlineno}" if code else ""
        raise UserError(f"{option}={path}{line}: get_config() returned {type(config).__name__}, not a ConfigDict.")
    return config.unlock()


@contextlib.contextmanager
def _mistakes_in(file: Path, place: str) -> Iterator[None]:
    """One line with the user's own line number for a file that is no Python, lacks an import or misuses a ConfigDict.

    Other errors of its code pass as they are.
    """
    try:
        yield
    except SyntaxError as error:
        where = f"{place}, line {error.lineno}" if error.filename == str(file) and error.lineno else place
        raise UserError(f"{where}: it is not Python ({error.msg}).") from error
    except (ImportError, NameError, AttributeError, TypeError, KeyError) as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
        own = [frame for frame in frames if frame.filename == str(file)]
        of_config = Path(ml_collections.__file__).parent in Path(frames[-1].filename).parents
        missing = isinstance(error, ImportError | NameError) and frames[-1].filename == str(file)
        if not own or not (missing or of_config):
            raise
        reason = re.sub(r" Other fields present: .*?}\"", "", _one_line(error))
        raise UserError(f"{place}, line {own[-1].lineno}: {reason.rstrip('.')}; correct it there.") from error


def _raised_inside(error: BaseException) -> bool:
    """Whether an error is a mistake in the file (a deep traceback) and not a rejected argument."""
    if isinstance(error, UserError):
        return True  # already says what is wrong
    here = __file__, contextlib.__file__
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename not in here]
    if isinstance(error, TypeError):
        return bool(frames)
    return any(frame.name != "get_config" for frame in frames)  # one may call another's with its argument


def _load_module(file: Path):
    """Executes a configuration file; one below `configs/` may import its siblings as `configs.name`."""
    added = [str(p.parent) for p in file.parents if p.name == "configs"][:1]
    added = [p for p in added if p not in sys.path]
    sys.path[:0] = added
    try:
        return execute(file)
    finally:
        for entry in added:
            sys.path.remove(entry)


def key_paths(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    """Dotted paths of all keys, inner nodes included."""
    for key in config:
        yield prefix + key
        if issubclass(config.get_type(key), ConfigDict):
            yield from key_paths(config[key], f"{prefix}{key}.")


def _take_config_path(argv: list[str]) -> tuple[str | None, list[str]]:
    path, rest, position = None, [], 0
    while position < len(argv):
        argument = argv[position]
        if argument in ("--config", "-config"):
            if position + 1 == len(argv):
                raise UserError("--config needs a value; name a configuration file, such as --config=configs/base.py.")
            path, position = argv[position + 1], position + 1
        elif re.match(r"--?config=", argument):
            path = argument.split("=", 1)[1]
        else:
            rest.append(argument)
        position += 1
    return path, rest


def _define(values: flags.FlagValues, extra_flags: dict[str, tuple[type, Any, str]]) -> None:
    define = {
        str: flags.DEFINE_string,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        bool: flags.DEFINE_bool,
        list: flags.DEFINE_multi_string,
    }
    for name, (kind, value, text) in extra_flags.items():
        define[kind](name, value, text, flag_values=values)


def _usage(path: str | None, extra_flags: dict[str, tuple[type, Any, str]]) -> str:
    lines = ["Options:", "  --config=FILE.py[:argument]   configuration file" + (f" (default {path})" if path else "")]
    lines.append("  --config.KEY=VALUE            changes one key of it; the keys are commented in config/keys.py")
    for name, (kind, value, text) in extra_flags.items():
        shown = f"--{name}" if kind is bool else f"--{name}={kind.__name__.upper()}"
        lines.append(f"  {shown:<29} {text}" + ("" if value in (None, "", False) else f" (default {value})"))
    return "\n".join(lines)


_OVERRIDE = re.compile(r"--?(?P<no>no)?config\.(?P<path>[^=]+)(?P<value>=.*)?$", re.DOTALL)


def _has(config: ConfigDict, path: str) -> bool:
    node: Any = config
    for key in path.split("."):
        if not isinstance(node, ConfigDict) or key not in node:
            return False
        node = node[key] if issubclass(node.get_type(key), ConfigDict) else None
    return True


def _add_open_keys(config: ConfigDict, argv: list[str], open_keys: Sequence[str]) -> list[str]:
    """Applies overrides that add a key below `open_keys`; returns the other arguments."""
    rest = []
    for argument in argv:
        match = _OVERRIDE.match(argument)
        path = match["path"] if match else ""
        inside = any(path.startswith(f"{key}.") for key in open_keys)
        if not inside or _has(config, path) or not match["value"]:
            rest.append(argument)
            continue
        *parents, last = path.split(".")
        node = config
        for key in parents:
            if key not in node:
                node[key] = ConfigDict()
            node = node[key]
            if not isinstance(node, ConfigDict):
                raise UserError(f"--config.{path}: config.{key} is a value and has no keys.")
        node[last] = _literal(match["value"][1:])
    return rest


def _literal(text: str) -> Any:
    text = text.capitalize() if text in ("true", "false") else text
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _check_keys(config: ConfigDict, argv: list[str]) -> None:
    for argument in argv:
        match = _OVERRIDE.match(argument)
        if match and not _has(config, match["path"]):
            raise UserError(f"--config.{match['path']} is not a configuration key; {_suggest(config, match['path'])}")


def _suggest(config: ConfigDict, path: str) -> str:
    known = list(key_paths(config))
    same_name = [k for k in known if k.rsplit(".", 1)[-1] == path.rsplit(".", 1)[-1]]
    close = difflib.get_close_matches(path, known, 1, 0.7) or same_name[:1] or difflib.get_close_matches(path, known, 1)
    if close:
        return f"did you mean --config.{close[0]}?"
    return f"the keys are {', '.join(config)}."


def _parse(values, config: ConfigDict, argv: list[str], extra_flags) -> list[str]:
    """Parses everything into `values` and `config`; returns positional arguments."""
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        return values(["program", *argv], known_only=False)[1:]
    except flags.UnrecognizedFlagError as error:
        name = error.flagname
        close = difflib.get_close_matches(name, [*extra_flags, "config"], 1)
        known = ", ".join(f"--{known}" for known in ("config", *extra_flags))
        hint = f"did you mean --{close[0]}?" if close else f"the options are {known}."
        raise UserError(f"--{name} is not an option; {hint}") from error
    except (flags.Error, ValueError, TypeError) as error:
        raise UserError(_wrong_value(config, argv, error)) from error


def _wrong_value(config: ConfigDict, argv: list[str], error: Exception) -> str:
    """Names the argument, the expected type and the default behind an absl error."""
    text = _one_line(error)
    match = re.search(r"flag --config\.(?P<path>[\w.]+)=(?P<value>.*?): ", text)
    if not match:
        return text if text.endswith(".") else f"{text}."
    path = match["path"]
    *parents, last = path.split(".")
    node = config
    for key in parents:
        node = node[key]
    kind = node.get_type(last).__name__
    if isinstance(node[last], ConfigDict):
        inner = ", ".join(f"{path}.{key}" for key in node[last])
        return f"--config.{path} is a group of keys; set one of them: {inner}."
    return f"--config.{path}={match['value']} is not of type {kind}; it is {node[last]!r} in the configuration."


def _one_line(error: BaseException) -> str:
    text = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(str(text).split()) or type(error).__name__
