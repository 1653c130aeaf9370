"""Sessions: prompts in, frames out; lengths through codec and chunk; recordings that are whole or not there."""

import dataclasses

import jax
import numpy as np
import pytest

from greedy_distill_jax.codecs.protocol import StreamDecoder, on_host
from greedy_distill_jax.codecs.vae_codec import VAECodec
from greedy_distill_jax.data.video_io import read_frames
from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.models.students.causal import CausalStudent
from greedy_distill_jax.models.students.etm_sdd import Student
from greedy_distill_jax.streaming.loop import noise_keys
from greedy_distill_jax.streaming.make import make_streamer
from greedy_distill_jax.streaming.recording import Recording, output_paths
from greedy_distill_jax.streaming.session import Session, Step, programs
from greedy_distill_jax.streaming.timeline import Timeline, check_switches
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.testing.vae import TINY, random_params

SHAPE = (4, 4, 4)


def text(prompts):
    """Rows that depend on the prompt alone."""
    return jax.numpy.concatenate([tiny.text_rows(1, jax.random.key(sum(map(ord, prompt)))) for prompt in prompts])


def session(prompts=("a", "b"), *, model=None, codec=None, seed=0, chunk=1):
    model = model or Student(tiny.student_config(chunk=chunk))
    params = tiny.random_params(model)
    streamer = make_streamer(model, StepPlan(((1.0, 0.5),)))
    return Session(streamer, params, codec, text, list(prompts), seed=seed, latent_shape=SHAPE)


@pytest.fixture(scope="module")
def codec():
    return VAECodec(TINY, random_params(TINY))


def latents(stream, chunks):
    return np.concatenate([np.asarray(stream.next_latents()) for _ in range(chunks)], axis=1)


def test_a_seed_and_a_prompt_are_a_video():
    first = latents(session(), 3)
    assert first.shape == (2, 3, *SHAPE)
    np.testing.assert_array_equal(first, latents(session(), 3))
    assert (first != latents(session(seed=1), 3)).any()
    assert (first[1] != latents(session("ac"), 3)[1]).any()


def test_a_stream_goes_on_behind_what_it_is_given(codec):
    first = latents(session(), 4)
    again = session()
    again.give(first[:, :2])
    np.testing.assert_allclose(latents(again, 4), first, atol=1e-5)
    for bad in (first[:1], first[..., :-1], first[:, :0]):
        with pytest.raises(ValueError, match=r"give: latents of shape .*; give \[2, T, 4, 4, 4\]"):
            again.give(bad)
    with pytest.raises(ValueError, match="multiple of the student's chunk of 2"):
        session(chunk=2).give(first[:, :3])


@pytest.mark.parametrize("model", [Student(tiny.student_config()), CausalStudent(tiny.causal_config())])
def test_a_video_does_not_depend_on_its_place_nor_on_its_company(model):
    alone, among = latents(session("b", model=model), 3), latents(session("abb", model=model), 3)
    for place in (1, 2):
        np.testing.assert_allclose(among[place], alone[0], atol=1e-5)


def test_a_session_is_its_programs_called_by_hand():
    stream = session()
    model = Student(tiny.student_config(chunk=1))
    own = programs(make_streamer(model, StepPlan(((1.0, 0.5),))))
    params = tiny.random_params(model)
    state = own.init(params, text("ab"), noise_keys(0, 2), SHAPE)
    for number in range(own.warm_up + 2):
        if number == 2:
            stream.switch_prompts(["c", "d"])
            state = own.switch_prompt(params, state, text("cd"))
        state, expected = own.step(number)(params, state)
        np.testing.assert_array_equal(stream.next_latents(), expected)


@pytest.mark.parametrize("model", [Student(tiny.student_config()), CausalStudent(tiny.causal_config())])
def test_a_second_session_compiles_nothing(model):
    shared, sizes = programs(make_streamer(model, StepPlan(((1.0, 0.5),)))), []
    for seed in range(2):
        stream = session(model=model, seed=seed)
        latents(stream, shared.warm_up + 1)
        stream.switch_prompts("c")
        jitted = shared.init, *shared.filling, *shared.steady, shared.switch_prompt
        sizes.append([call._cache_size() for call in jitted])
    assert sizes[0] == sizes[1]


@pytest.fixture
def compilations():
    """Durations of what jax traced, lowered and compiled since the list was cleared, by name."""
    events = []

    def listen(event, _, **more):
        if event.startswith("/jax/core/compile/"):
            events.append((event.rpartition("/")[2], more.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def encoder(prompts):
    """An encoder for prompts that compiles nothing when it is called."""
    rows = {prompt: text([prompt]) for prompt in prompts}
    return lambda asked: rows[asked[0]]


@pytest.mark.parametrize("causal, placed, prepare", [(False, True, False), (True, False, True)])
def test_nothing_is_compiled_in_mid_stream(codec, compilations, causal, placed, prepare):
    model = CausalStudent(tiny.causal_config()) if causal else Student(tiny.student_config(context="fused"))
    params, plan = tiny.random_params(model), StepPlan(((1.0, 0.75, 0.5), (1.0,)))  # of this test alone
    params = jax.device_put(params, jax.devices()[0]) if placed else params
    stream = Session(make_streamer(model, plan), params, codec, encoder("ab"), ["a"], latent_shape=SHAPE)
    compilations.clear()
    if prepare:
        stream.prepare()
    else:
        stream.next_frames()  # the first chunk waits for all programs, no other one for any
    lowered = [name for event, name in compilations if event == "jaxpr_to_mlir_module_duration"]
    assert [lowered.count(f"jit({name})") for name in ("make", "finish", "switch_prompt")] == [2, 2, 1]
    compilations.clear()
    for number in range(stream._programs.warm_up + 3):
        if number in (1, stream._programs.warm_up + 1):
            stream.switch_prompts("b")
        assert np.ptp(stream.next_frames()) > 0
    assert compilations == []


def test_given_chunks_and_another_reader_compile_nothing_either(codec, compilations):
    """Frames after a stream was made ready for latents; chunks that are given while it runs."""
    model, plan = Student(tiny.student_config(chunk=1)), StepPlan(((1.0, 0.55),))  # of this test alone
    params = jax.device_put(tiny.random_params(model), jax.devices()[0])
    stream = Session(make_streamer(model, plan), params, codec, encoder("a"), ["a"], latent_shape=SHAPE)
    stream.prepare(frames=False)
    assert stream.next_frames().shape[1] == 1
    given = np.random.default_rng(0).standard_normal((1, 2, *SHAPE)).astype(np.float32)
    expected = given.copy()
    stream.give(given)
    given[:] = 0  # it was copied
    compilations.clear()
    seen = [stream.next_frames() for _ in range(stream._programs.warm_up + 3)]
    assert compilations == [] and len(seen) > 3
    other = Session(make_streamer(model, plan), params, None, encoder("a"), ["a"], latent_shape=SHAPE)
    other.next_latents()
    other.give(expected)
    np.testing.assert_array_equal(np.concatenate([other.next_latents() for _ in range(2)], axis=1), expected)
    with pytest.raises(RuntimeError, match="no codec that makes video"):
        other.next_frames()


def test_decoders_of_a_codec_share_their_program(codec, compilations):
    model, plan = Student(tiny.student_config(chunk=1)), StepPlan(((1.0, 0.5),))
    for _ in range(2):
        compilations.clear()
        stream = Session(make_streamer(model, plan), tiny.random_params(model), codec, text, ["a"], latent_shape=SHAPE)
        compilations.clear()
        stream.prepare()
    assert compilations == []


def test_a_short_stream_compiles_what_it_needs(compilations):
    model, plan = Student(tiny.student_config(chunk=1)), StepPlan(((1.0, 0.6),))  # of this test alone
    stream = Session(make_streamer(model, plan), tiny.random_params(model), None, text, ["a"], latent_shape=SHAPE)
    for chunks in (stream._programs.warm_up, stream._programs.warm_up + 1):  # the step while slots fill, and the other
        compilations.clear()
        stream.prepare(chunks, switches=False)
        assert [name for event, name in compilations if "mlir" in event] == ["jit(make)", "jit(finish)"]
    compilations.clear()
    latents(stream, chunks)
    assert compilations == []


def test_given_chunks_need_no_step(compilations):
    """Compiled is what chunks that are made need, from the first one behind those that are given."""
    model, plan = Student(tiny.student_config(chunk=1)), StepPlan(((1.0, 0.65),))  # of this test alone
    stream = Session(make_streamer(model, plan), tiny.random_params(model), None, text, ["a"], latent_shape=SHAPE)
    warm_up = stream._programs.warm_up
    assert warm_up > 1
    stream.give(np.zeros((1, warm_up, *SHAPE), np.float32))
    for chunks, steps in ((warm_up, 0), (warm_up + 1, 1)):
        compilations.clear()
        stream.prepare(chunks, switches=False)
        assert [name for event, name in compilations if "mlir" in event] == ["jit(make)", "jit(finish)"] * steps
    compilations.clear()
    latents(stream, warm_up + 1)
    assert compilations == []


def test_a_video_that_is_left_early_goes_on_where_it_was_left(codec):
    whole, left = list(session(codec=codec).play(13)), session(codec=codec)
    next(left.play(13))
    np.testing.assert_array_equal(left.next_frames(), whole[1])
    again = left.play(5)
    np.testing.assert_array_equal(next(again), whole[2])
    again.close()
    np.testing.assert_array_equal(np.concatenate(list(left.play(1)), axis=1), whole[3])


def test_frames_are_decoded_as_one_stream(codec):
    whole = codec.decode(latents(session(), 3))
    video = list(session(codec=codec).play(9))
    assert [chunk.shape[1] for chunk in video] == [1, 4, 4] and video[0].dtype == np.uint8
    np.testing.assert_allclose(np.concatenate(video, axis=1).astype(int), whole, atol=1)


def test_a_chunk_is_handed_out_before_the_pass_for_later_ones(codec):
    stream, order = session(codec=codec), []
    stream.prepare()

    def watched(name, call):
        return lambda *args: (order.append(name), call(*args))[1]

    def both(step):
        return Step(watched("make", step.make), watched("finish", step.finish))

    own = stream._programs
    stream._programs = own._replace(filling=both(own.filling), steady=both(own.steady))
    start = StreamDecoder.start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StreamDecoder, "start", watched("decode", start))
        patch.setattr("greedy_distill_jax.streaming.session.on_host", watched("copy", on_host))
        video = list(stream.play(9))
    chunk = ["make", "decode", "finish"]
    assert order == [*chunk, *chunk, "copy", *chunk, "copy", "copy"]  # the device is told of the next one before
    one_by_one = session(codec=codec)
    again = [one_by_one.next_frames() for _ in video]
    np.testing.assert_array_equal(np.concatenate(video, axis=1), np.concatenate(again, axis=1))


@pytest.mark.parametrize("causal", [False, True])
def test_weights_in_the_dtype_of_the_matmuls_are_the_same_stream(causal):
    base = dataclasses.replace(tiny.BASE, dtype="bfloat16")
    model = CausalStudent(tiny.causal_config(base=base)) if causal else Student(tiny.student_config(base=base))
    params, streams = tiny.random_params(model), []
    for weights in ("compute", "float32"):
        streamer, options = make_streamer(model, StepPlan(((1.0, 0.5),))), dict(latent_shape=SHAPE, weights=weights)
        streams.append(Session(streamer, params, None, text, ["a"], **options))
    np.testing.assert_array_equal(*(latents(stream, 3) for stream in streams))
    held = [sum(x.nbytes for x in jax.tree.leaves(stream._params)) for stream in streams]
    assert 0.5 < held[0] / held[1] < 0.7
    with pytest.raises(UserError, match="weights 'half' are unknown; choose from compute, float32"):
        Session(streamer, params, None, text, ["a"], latent_shape=SHAPE, weights="half")


def test_a_prompt_changes_what_follows_and_nothing_before(codec):
    plain, switched = (
        np.concatenate(list(session(codec=codec).play(13, switches)), axis=1) for switches in (None, {5: "another"})
    )
    np.testing.assert_array_equal(plain[:, :5], switched[:, :5])
    assert (plain[:, 5:] != switched[:, 5:]).any()


def test_what_does_not_fit_is_refused_before_anything_is_made(codec):
    stream = session(codec=codec, chunk=2)
    for frames, switches, field in ((9, {}, "frames"), (13, {4: "c"}, "switches"), (13, {13: "c"}, "switches")):
        with pytest.raises(UserError) as error:
            stream.play(frames, switches)
        assert error.value.field == field
    assert int(stream.state.index) == 0
    with pytest.raises(ValueError, match="1 prompts for 2 videos"):
        stream.switch_prompts(["c"])


def test_a_decoder_that_missed_chunks_is_refused(codec):
    stream = session(codec=codec)
    stream.next_latents()
    with pytest.raises(RuntimeError, match="missed chunks"):
        stream.next_frames()


@pytest.mark.parametrize("stride, chunk, filled", [(1, 1, 64), (1, 3, 66), (4, 1, 65), (4, 3, 69)])
def test_lengths_go_through_codec_and_chunk(stride, chunk, filled):
    timeline = Timeline(stride, chunk)
    assert timeline.fill(64) == filled
    assert timeline.video_frames(timeline.latent_frames(filled)) == filled
    assert timeline.latent_frames(filled) % chunk == 0


@pytest.mark.parametrize(
    "timeline, frames, message",
    [
        (Timeline(4, 3), 65, "65 frames do not fit the student's chunk of 3 latent frames; choose 57 or 69"),
        (Timeline(1, 2), 7, "chunk of 2 latent frames; choose 6 or 8"),
        (Timeline(1, 2), 1, "choose 2$"),
        (Timeline(4), 8, r"8 frames do not fit the codec, which makes 1 \+ 4 k of them; choose 5 or 9"),
        (Timeline(4), 0, "choose 1 or 5"),
    ],
)
def test_lengths_that_do_not_fit(timeline, frames, message):
    with pytest.raises(UserError, match=message) as error:
        timeline.latent_frames(frames, "switches")
    assert error.value.field == "switches"


@pytest.mark.parametrize(
    "switch, frames, message",
    [
        (6, 6, "frame 6 lies outside the video of 6 frames; choose 1 to 5, or make more than 6"),
        (0, 6, "choose 1 to 5, or change the first prompt"),
        (1, 1, "a video of 1 frame has nothing to switch"),
    ],
)
def test_switches_outside_the_video(switch, frames, message):
    with pytest.raises(UserError, match=message):
        check_switches([3, switch] if frames > 3 else [switch], frames)
    check_switches([1, 5], 6)


def frames(videos=2, count=3):
    return np.random.default_rng(0).integers(0, 256, (videos, count, 16, 16, 3), np.uint8)


def test_a_recording_is_a_file_for_each_video(tmp_path):
    paths = output_paths(tmp_path / "new" / "out.mp4", 2)
    assert [path.name for path in paths] == ["out-0.mp4", "out-1.mp4"]
    with Recording(paths) as recording:
        recording.fps = 8
        for _ in range(2):
            recording.write(frames())
    for path in paths:
        stored = list(read_frames(path))
        assert len(stored) == 6 and stored[0].shape == (128, 128, 3)  # small videos are enlarged


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_a_recording_that_ends_early_leaves_nothing(tmp_path, error):
    with pytest.raises(error), Recording(output_paths(tmp_path / "out.mp4", 2), fps=8) as recording:
        recording.write(frames())
        raise error
    assert not list(tmp_path.iterdir())


def test_a_recording_that_cannot_be_written_is_refused_before_a_frame(tmp_path):
    (tmp_path / "out-1.mp4").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        Recording(output_paths(tmp_path / "out.mp4", 2), fps=8)
    assert [path.name for path in tmp_path.iterdir()] == ["out-1.mp4"]


def test_the_rate_of_a_recording_is_checked_when_it_is_set(tmp_path):
    with (
        pytest.raises(ValueError, match="set fps before the first frame"),
        Recording([tmp_path / "out.gif"]) as recording,
    ):
        recording.write(frames(1))
    with pytest.raises(UserError, match="fps=60 is no rate of a .gif"), Recording([tmp_path / "out.gif"]) as recording:
        recording.fps = 60
    assert not list(tmp_path.iterdir())
