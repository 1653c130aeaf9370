"""The scripts that start trainings on many hosts, with stand-ins for what they call; and what manifests say."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import yaml

from greedy_distill_jax import cli, train
from greedy_distill_jax.cli.config_flags import load_config
from greedy_distill_jax.config import open_keys
from greedy_distill_jax.errors import Stopped, UserError
from tests.conftest import ROOT

LAUNCH = Path(ROOT) / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch", Path(ROOT) / ".ci" / "run"]
SHELLCHECK = Path(sys.executable).parent / "shellcheck"
ARGUMENTS = ["--config=a file.py", "--workdir=runs/x", "--config.data.source=clips:it's"]
# Does what the next line of $PLAN says: an exit code, or a command and then 0; notes its own words.
PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "$(printf '%q ' "$@")" >>"$CALLS"
plan="$(head -n 1 "$PLAN")"
sed -i 1d "$PLAN"
case "$plan" in
  '') exit 0 ;;
  [0-9]*) exit "$plan" ;;
esac
eval "$plan"
"""


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def job(tmp_path):
    """(environment, calls made, set the plan) with a Python that only notes what it is called with."""
    executable(tmp_path / "venv" / "bin" / "python", PYTHON)
    (tmp_path / "plan").touch()
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "VENV": str(tmp_path / "venv"), "PAUSE": "0"}
    env |= {"CALLS": str(tmp_path / "calls"), "PLAN": str(tmp_path / "plan"), "HOME": str(tmp_path / "home")}

    def calls():
        noted = tmp_path / "calls"
        return [shlex.split(line) for line in noted.read_text().splitlines()] if noted.exists() else []

    return env, calls, lambda *steps: (tmp_path / "plan").write_text("".join(f"{step}\n" for step in steps))


def run(script, *arguments, env, cwd=ROOT):
    return subprocess.run(["bash", script, *arguments], env=env, cwd=cwd, capture_output=True, text=True, timeout=600)


def kinds(calls):
    return ["train" if "greedy_distill_jax.train" in call else "preflight" for call in calls]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
    done = subprocess.run([SHELLCHECK, "-x", "-S", "warning", script], cwd=LAUNCH, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_train_looks_at_the_hosts_and_trains(job):
    env, calls, _ = job
    done = run("launch/train.sh", *ARGUMENTS, env=env | {"DEVICES": "8", "LAUNCHER": "env SEEN=1"})
    assert done.returncode == 0, done.stderr
    assert calls() == [
        [f"{ROOT}/launch/preflight.py", "--devices=8", *ARGUMENTS],
        ["-m", "greedy_distill_jax.train", *ARGUMENTS],
    ]


@pytest.mark.parametrize("code", [cli.RETRY, 134, 137, 139, 253])
def test_train_starts_again_a_bounded_number_of_times(job, code):
    env, calls, plan = job
    plan(*[0, code] * 9)
    done = run("launch/train.sh", *ARGUMENTS, env=env | {"RESTARTS": "2"})
    assert done.returncode == code and kinds(calls()) == ["preflight", "train"] * 3
    assert f"exit code {code}; starting again from step 0 in 0 s (2 of 2)" in done.stderr
    assert done.stderr.splitlines()[-1].endswith("no further start after 2 without a new checkpoint (RESTARTS=2)")


@pytest.mark.parametrize("code", [1, 2, 3, 4, 130, 143])
def test_what_another_start_does_not_cure_is_final(job, code):
    env, calls, plan = job
    plan(0, code)
    assert run("launch/train.sh", *ARGUMENTS, env=env).returncode == code and kinds(calls()) == ["preflight", "train"]


def test_hosts_with_something_wrong_do_not_train(job):
    env, calls, plan = job
    plan(2)
    assert run("launch/train.sh", *ARGUMENTS, env=env).returncode == 2 and kinds(calls()) == ["preflight"]
    plan(cli.RETRY)  # one did not come in time
    assert run("launch/train.sh", *ARGUMENTS, env=env).returncode == 0
    assert kinds(calls())[1:] == ["preflight", "preflight", "train"]


@pytest.mark.parametrize("given", [["--workdir=~/run"], ["--workdir", "{tmp_path}/home/run"], ["--workdir", "~/run"]])
def test_the_folder_is_found_as_the_training_finds_it(job, tmp_path, given):
    env, _, plan = job
    plan(0, f"mkdir -p {tmp_path}/home/run/checkpoints/9; exit 75")
    given = [word.format(tmp_path=tmp_path) for word in given]
    assert "starting again from step 9 " in run("launch/train.sh", "--config=x", *given, env=env).stderr


def test_a_new_checkpoint_gives_all_restarts_back(job, tmp_path):
    env, calls, plan = job
    saves = [f"mkdir -p {tmp_path}/run/checkpoints/{step}; exit 75" for step in (9, 10, 11)]
    damaged = f"mkdir -p {tmp_path}/run/checkpoints/99.orbax-checkpoint-tmp; exit 75"
    plan(*[step for save in saves for step in (0, save)], 0, damaged)
    done = run("launch/train.sh", "--config=x", f"--workdir={tmp_path}/run", env=env | {"RESTARTS": "1"})
    assert done.returncode == 75 and kinds(calls()) == ["preflight", "train"] * 4
    assert [int(step) for step in re.findall(r"from step (\d+)", done.stderr)] == [9, 10, 11]


def test_a_step_that_is_moved_away_and_made_again_gives_no_restart_back(job, tmp_path):
    env, calls, plan = job
    steps = tmp_path / "run" / "checkpoints"
    moved, again = f"mv {steps}/20 {steps}-damaged-20; exit 75", f"mkdir {steps}/20; exit 75"
    plan(0, f"mkdir -p {steps}/9 {steps}/20; exit 75", 0, moved, 0, again, 0, moved.replace("-20", "-20.1"), 0, again)
    done = run("launch/train.sh", "--config=x", f"--workdir={tmp_path}/run", env=env | {"RESTARTS": "2"})
    assert done.returncode == 75 and kinds(calls()) == ["preflight", "train"] * 3
    assert re.findall(r"from step (\d+) in 0 s \((\d)", done.stderr) == [("20", "1"), ("9", "2")]


@pytest.mark.parametrize(
    "number, ends, code", [(signal.SIGTERM, 0, 0), (signal.SIGTERM, 75, 75), (signal.SIGINT, 0, 0)]
)
def test_a_signal_reaches_the_training_and_nothing_starts_again(job, tmp_path, number, ends, code):
    env, calls, plan = job
    plan(0, f"trap 'echo saved; exit {ends}' TERM; touch {tmp_path}/ready; while :; do sleep 0.02; done")
    script = subprocess.Popen(
        ["bash", "launch/train.sh", *ARGUMENTS], env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        while not (tmp_path / "ready").exists():
            assert script.poll() is None
            time.sleep(0.01)
        script.send_signal(number)
        assert script.communicate(timeout=600)[0] == "saved\n" and script.returncode == code
    finally:
        script.kill()
    assert kinds(calls()) == ["preflight", "train"]


@pytest.mark.parametrize("start", [2, 3], ids=["training", "pause"])
def test_a_signal_between_a_start_and_its_number_is_not_lost(job, tmp_path, start):
    env, calls, plan = job
    plan(0, "for ((i = 0; i < 100; i++)); do sleep 0.02; done" if start == 2 else cli.RETRY)
    (tmp_path / "hook").write_text(  # bash reads it first, and runs what it traps before every command
        f"""[ "${{0##*/}}" = train.sh ] || return 0
        set -T; starts=0
        trap 'if [ "$BASH_COMMAND" = "child=\\$!" ] && [ $((++starts)) = {start} ]; then kill -TERM $$; fi' DEBUG
        """
    )
    done = run("launch/train.sh", *ARGUMENTS, env=env | {"BASH_ENV": str(tmp_path / "hook"), "PAUSE": "600"})
    assert done.returncode == 143 and kinds(calls()) in (["preflight"], ["preflight", "train"])


def test_an_empty_list_is_nothing_to_an_old_bash():
    """Before 4.4 "${list[@]}" of an empty one is an unset variable, which set -u refuses."""
    assert re.findall(r"\S*\$\{launcher\[@\]\}\S*", (LAUNCH / "train.sh").read_text()) == [
        '${launcher[@]+"${launcher[@]}"}'
    ]


def test_sbatch_hands_a_signal_on_to_the_tasks(job, tmp_path):
    """Not to srun, which kills its tasks for a SIGTERM of its own."""
    env, calls, plan = job
    executable(tmp_path / "bin" / "srun", SRUN)
    executable(tmp_path / "bin" / "scancel", f'#!/usr/bin/env bash\necho "$*" >{tmp_path}/told\n')
    plan(0, f"touch {tmp_path}/ready; until [ -f {tmp_path}/told ]; do sleep 0.02; done")
    slurm = {"SLURM_SUBMIT_DIR": ROOT, "SLURM_JOB_ID": "42"}
    script = subprocess.Popen(["bash", "launch/slurm.sbatch", *ARGUMENTS], env=env | slurm, cwd=ROOT)
    try:
        while not (tmp_path / "ready").exists():
            assert script.poll() is None
            time.sleep(0.01)
        script.send_signal(signal.SIGTERM)
        assert script.wait(60) == 0
    finally:
        script.kill()
    assert (tmp_path / "told").read_text() == "--signal=TERM 42\n" and kinds(calls()) == ["preflight", "train"]


@pytest.mark.parametrize(
    "arguments, changes, line",
    [
        (["--config=x"], {}, "error: --workdir=DIR is missing."),
        (ARGUMENTS, {"RESTARTS": "many"}, "error: RESTARTS is many; it must be a number from 0 on."),
        (ARGUMENTS, {"VENV": "/nowhere"}, "error: /nowhere/bin/python is not there; install the package into /nowhere"),
    ],
)
def test_what_train_needs(job, arguments, changes, line):
    env, calls, _ = job
    done = run("launch/train.sh", *arguments, env=env | changes)
    assert done.returncode == 2 and done.stderr.startswith(line) and not calls()


SRUN = """#!/usr/bin/env bash
echo "$SRUN_CPUS_PER_TASK $*" >>"$CALLS.srun"
while [[ "$1" == --* ]]; do shift; done
exec "$@"
"""


def test_sbatch_runs_every_task_by_srun(job, tmp_path):
    env, calls, _ = job
    executable(tmp_path / "bin" / "srun", SRUN)
    copy = shutil.copy(LAUNCH / "slurm.sbatch", tmp_path / "slurm_script")  # as SLURM does
    slurm = {"SLURM_SUBMIT_DIR": ROOT, "SLURM_CPUS_PER_TASK": "12"}
    done = run(copy, *ARGUMENTS, env=env | slurm, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert kinds(calls()) == ["preflight", "train"] and calls()[1][2:] == ARGUMENTS
    options = f"12 --label --kill-on-bad-exit=1 {tmp_path / 'venv' / 'bin' / 'python'} "
    assert [line.startswith(options) for line in (tmp_path / "calls.srun").read_text().splitlines()] == [True, True]
    elsewhere = run(copy, env=env | {"SLURM_SUBMIT_DIR": str(tmp_path)}, cwd=tmp_path)
    assert elsewhere.returncode == 2 and "is not the checkout; run sbatch there" in elsewhere.stderr


def test_sbatch_asks_for_a_process_per_card_and_a_signal_before_the_end():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    asked = [line.split()[1] for line in lines[:first] if line.startswith("#SBATCH")]
    assert not [line for line in lines[first:] if line.startswith("#SBATCH")]  # SLURM does not read them there
    options = dict(option.removeprefix("--").partition("=")[::2] for option in asked)
    assert options["ntasks-per-node"] == options["gpus-per-node"] and "requeue" in options
    assert re.fullmatch(r"TERM@\d+", options["signal"])  # without B: to the tasks, not to the script


# Notes its words, one call a line; copies what scp sends, and runs what ssh is to run, in $HOME.
GCLOUD = """#!/usr/bin/env bash
printf '%s\\n' "$(printf '%q ' "$@")" >>"$CALLS.gcloud"
for word in "$@"; do
  case "$word" in
    --command=*) cd "$HOME" && exec bash -c "${word#--command=}" ;;
    *.tar.gz) [ "${4}" = scp ] && [ -f "$word" ] && cp "$word" "$HOME/" ;;
  esac
done
exit 0
"""
REMOTE = """#!/usr/bin/env bash
printf '%s\\n' "${RESTARTS:-} ${JOIN_TIMEOUT:-} $(printf '%q ' "$@")" >"$HOME/started"
echo said
"""


@pytest.fixture
def tpu(job, tmp_path):
    """(environment, calls of gcloud) of a worker whose home is a folder here."""
    env, *_ = job
    executable(tmp_path / "bin" / "gcloud", GCLOUD)
    executable(tmp_path / "home" / "greedy_distill_jax" / "launch" / "train.sh", REMOTE)
    noted = tmp_path / "calls.gcloud"
    env |= {"TPU": "slice", "ZONE": "us-central2-b", "CALLS": str(tmp_path / "calls")}
    return env, lambda: [shlex.split(line) for line in noted.read_text().splitlines()]


WHERE = ["--zone=us-central2-b", "--worker=all"]


def test_a_tpu_vm_trains_on_all_workers(tpu, tmp_path):
    env, calls = tpu
    done = run("launch/tpu_vm.sh", "train", *ARGUMENTS, env=env | {"RESTARTS": "7", "PROJECT": "mine"})
    assert done.returncode == 0, done.stderr
    ((*command, last),) = calls()
    assert command == ["compute", "tpus", "tpu-vm", "ssh", "slice", *WHERE, "--project=mine"]
    assert last.startswith("--command=cd greedy_distill_jax || ")
    started, log = tmp_path / "home" / "started", tmp_path / "home" / "greedy_distill_jax" / "train.log"
    for _ in range(1000):  # it goes on in the background
        if log.exists() and log.read_text() == "said\n":
            break
        time.sleep(0.01)
    assert shlex.split(started.read_text()) == ["7", *ARGUMENTS]


def test_a_tpu_vm_without_the_package_does_not_train(tpu, tmp_path):
    env, _ = tpu
    shutil.rmtree(tmp_path / "home" / "greedy_distill_jax")
    done = run("launch/tpu_vm.sh", "train", *ARGUMENTS, env=env)
    assert done.returncode == 2 and done.stderr.endswith("install comes first\n")
    assert not list((tmp_path / "home").iterdir())


def test_a_tpu_vm_gets_what_git_tracks(tpu, tmp_path):
    env, calls = tpu
    done = run("launch/tpu_vm.sh", "install", env=env)
    copy, install = calls()
    assert copy[:4] == ["compute", "tpus", "tpu-vm", "scp"] and copy[5:] == ["slice:greedy_distill_jax.tar.gz", *WHERE]
    assert install[-1].endswith("bash -c 'source launch/_env.sh && ensure_env tpu'")
    with tarfile.open(tmp_path / "home" / "greedy_distill_jax.tar.gz") as archive:
        names = archive.getnames()
    assert {"setup.py", "launch/train.sh", "greedy_distill_jax/train.py"} <= set(names)
    assert not [name for name in names if name.startswith((".venv", "runs/", ".git/"))]
    assert done.returncode == 0 and not Path(copy[4]).exists()
    assert f"--editable {tmp_path}/home/greedy_distill_jax" in (tmp_path / "calls").read_text().replace("\\", "")


@pytest.mark.parametrize("action", ["logs", "stop"])
def test_a_tpu_vm_is_followed_and_stopped(tpu, tmp_path, action):
    env, calls = tpu
    for name in ("tail", "pkill"):
        executable(tmp_path / "bin" / name, "#!/bin/sh\nexit 0\n")
    assert run("launch/tpu_vm.sh", action, env=env).returncode == 0
    wanted = {"logs": "tail -n 20 -F greedy_distill_jax/train.log", "stop": "pkill -TERM -f '^bash [l]aunch/train.sh'"}
    assert calls()[0][-1] == f"--command={wanted[action]}"


@pytest.mark.parametrize(
    "arguments, changes, line",
    [
        (["train"], {"ZONE": ""}, "error: TPU and ZONE are not both set; TPU=NAME ZONE=ZONE bash launch/tpu_vm.sh"),
        (["fly"], {}, "error: 'fly' is none of install, train, logs, stop"),
        ([], {}, "error: '' is none of install, train, logs, stop"),
    ],
)
def test_what_a_tpu_vm_needs(tpu, arguments, changes, line):
    env, _ = tpu
    done = run("launch/tpu_vm.sh", *arguments, env=env | changes)
    assert done.returncode == 2 and done.stderr.startswith(line)


def test_a_training_that_was_stopped_may_have_another_exit_code(monkeypatch):
    assert cli.outcome(Stopped("saved")) == (0, "saved")
    monkeypatch.setenv("STOPPED_EXIT_CODE", str(cli.RETRY))
    assert cli.outcome(Stopped("saved")) == (75, "saved")
    for wrong in ("again", "256", "\N{SUPERSCRIPT TWO}", "-1"):
        monkeypatch.setenv("STOPPED_EXIT_CODE", wrong)
        told = f"STOPPED_EXIT_CODE is {wrong!r}; it must be a number from 0 to 255."
        assert cli.outcome(Stopped("saved")) == (2, f"error: {told} saved")
        with pytest.raises(UserError, match=told):  # a training says it at its start
            train.main(["--workdir=x"])


def test_the_jobset_restarts_all_after_what_a_restart_cures():
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    policy = jobset["spec"]["failurePolicy"]
    (rule,) = policy["rules"]
    assert policy["maxRestarts"] > 0
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])  # JobSet allows no hyphen
    (slices,) = jobset["spec"]["replicatedJobs"]
    spec = slices["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["backoffLimit"] == 0
    (ends,) = spec["podFailurePolicy"]["rules"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["restartPolicy"] == "Never"  # a pod failure policy needs that
    assert (ends["action"], ends["onExitCodes"]["operator"]) == ("FailJob", "In")
    assert ends["onExitCodes"]["containerName"] == container["name"]
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", Path(ROOT, "docs/errors.md").read_text(), re.M)}
    assert set(ends["onExitCodes"]["values"]) == documented - {0, cli.RETRY, 130, 141, 143}


def test_the_jobset_has_a_pod_per_host_with_all_its_chips():
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    x, y = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert spec["parallelism"] == spec["completions"] == x * y // chips
    env = {variable["name"]: variable["value"] for variable in container["env"]}
    assert env == {"RESTARTS": "0", "STOPPED_EXIT_CODE": str(cli.RETRY), "DEVICES": str(chips)}
    assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"] for volume in pod["volumes"]]
    _, flags = load_config(container["args"], {"workdir": (str, None, "")}, open_keys=open_keys())
    assert flags["workdir"].startswith(container["volumeMounts"][0]["mountPath"])


def test_the_image_holds_what_its_entry_point_starts():
    text = re.sub(r"^#.*\n", "", (LAUNCH / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    steps = [line.split(None, 1) for line in text.splitlines() if line.strip()]
    of = {name: [rest for step, rest in steps if step == name] for name, _ in steps}
    assert steps[0][0] == "FROM" and re.fullmatch(r"python:3\.1[1-9]-slim", of["FROM"][0])
    assert set(of) == {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "ENV", "ENTRYPOINT"}
    sources = [source for copy in of["COPY"] for source in copy.split()[:-1]]
    assert not [source for source in sources if not (Path(ROOT) / source).exists()]
    assert {"setup.py", "greedy_distill_jax", "configs", "launch"} <= set(sources)
    assert json.loads(of["ENTRYPOINT"][0]) == ["bash", "launch/train.sh"]
    assert of["ARG"] == ["EXTRA=tpu"] and ".venv/bin/pip install --no-cache-dir --editable" in of["RUN"][0]
    assert steps.index(["COPY", "launch launch"]) > [step for step, _ in steps].index("RUN")  # cached for all versions
