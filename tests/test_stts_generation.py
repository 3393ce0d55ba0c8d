import copy

import pytest
import torch
from inputs import PAD, PLACEHOLDER, lively_model, row_of, video_inputs
from transformers import CompileConfig, DynamicCache, GenerationConfig
from transformers.generation import LogitsProcessor, RepetitionPenaltyLogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from modeling_stts.stts_generation import UncutStoppingCriteria
from modeling_stts.stts_release import TRANSFORMERS


VIDEO_NAMES = ("pixel_values_videos", "video_token_pooling", "video_grids")
LENGTH = 341  # of the prompt of one video of 4 frames


@pytest.fixture(scope="module")
def model():
    return lively_model(prune_ratio=0.5)


def greedy_by_forward(model, inputs, num_new, **kwargs):
    """Greedy search without a cache: the whole uncut prompt goes through `forward` for every token."""
    inputs, logits = dict(inputs), []
    for _ in range(num_new):
        with torch.no_grad():
            logits.append(model(**inputs, **kwargs).logits[:, -1])
        inputs = append(inputs, logits[-1].argmax(-1, keepdim=True))
    return inputs["input_ids"], torch.stack(logits)


def append(inputs, tokens):
    """Inputs whose prompt goes on with some tokens."""
    ids = torch.cat([inputs["input_ids"], tokens], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1)
    return dict(inputs, input_ids=ids, attention_mask=mask, mm_token_type_ids=(ids == PLACEHOLDER).long())


def generate(model, inputs, num_new=6, **kwargs):
    kwargs = {"do_sample": False, "max_new_tokens": num_new, "return_dict_in_generate": True} | kwargs
    return model.generate(**inputs, output_logits=True, **kwargs)


@pytest.mark.parametrize("position_ids", ["original", "compact"])
@pytest.mark.parametrize("kwargs", [{}, {"prune_ratio": 0.8}])
def test_generate_equals_teacher_forced_forward(position_ids, kwargs):
    model, inputs = lively_model(position_ids=position_ids), video_inputs((4,))
    outputs = generate(model, inputs, **kwargs)
    sequences, logits = greedy_by_forward(model, inputs, 6, **kwargs)
    assert torch.equal(outputs.sequences, sequences)
    torch.testing.assert_close(torch.stack(outputs.logits), logits, atol=1e-3, rtol=1e-3)


def test_sequences_begin_with_the_original_prompt(model):
    inputs = video_inputs((4, 2))
    sequences = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    assert sequences.shape == (2, LENGTH + 3)


def test_batch_generate_equals_single_generate(model):
    inputs = video_inputs((4, 1, 6))
    together = generate(model, inputs)
    for row in range(3):
        alone = generate(model, row_of(inputs, row))
        assert torch.equal(together.sequences[row, -6:], alone.sequences[0, -6:])
        logits = torch.stack(together.logits)[:, row]
        torch.testing.assert_close(logits, torch.stack(alone.logits)[:, 0], atol=1e-3, rtol=1e-3)


def test_padding_is_recognised_without_a_mask(model):
    inputs = video_inputs((4, 2))
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    inputs.pop("attention_mask")
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), expected)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3},
        {"past_key_values": DynamicCache()},
        {"max_new_tokens": None, "max_length": LENGTH + 6},
        {"generation_config": GenerationConfig(max_length=LENGTH + 6, do_sample=False, pad_token_id=PAD)},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_ways_of_greedy_decoding_agree(model, kwargs):
    inputs = video_inputs((4,))
    expected = generate(model, inputs)
    if "generation_config" in kwargs:
        outputs = model.generate(**inputs, **kwargs)
    else:
        outputs = generate(model, inputs, **kwargs).sequences
    assert torch.equal(outputs, expected.sequences)


def test_prefill_in_chunks_equals_the_native_model_on_the_cut_prompt(model):
    inputs = video_inputs((4,))
    with torch.no_grad():
        cut = model(**inputs)
        video = model.get_video_features(
            **{name: inputs[name] for name in ("pixel_values_videos", "video_token_pooling", "video_grids")}
        )
    ids = inputs["input_ids"].gather(1, cut.kept_token_idx)
    native = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": cut.kept_token_idx,
        "mm_token_type_ids": (ids == PLACEHOLDER).long(),
        "mm_encoder_outputs": {"video": video},
    }
    expected = generate(model, native, prefill_chunk_size=50)
    outputs = generate(model, inputs, prefill_chunk_size=50)
    assert torch.equal(outputs.sequences[:, -6:], expected.sequences[:, -6:])
    torch.testing.assert_close(torch.stack(outputs.logits), torch.stack(expected.logits))


def test_assisted_decoding_agrees_and_prunes_once(model):
    inputs, expected = video_inputs((4,)), generate(model, video_inputs((4,)))
    assistant = copy.deepcopy(model)
    calls = []
    assistant.model.vision_tower.register_forward_hook(lambda *args: calls.append(1))
    outputs = generate(model, inputs, assistant_model=assistant)
    assert torch.equal(outputs.sequences, expected.sequences)
    assert calls == []


def test_beams_and_return_sequences(model):
    inputs = video_inputs((4, 2))
    outputs = generate(model, inputs, num_beams=3, num_return_sequences=2, output_scores=True)
    assert outputs.sequences.shape == (4, LENGTH + 6)
    assert torch.equal(outputs.sequences[:, :LENGTH], inputs["input_ids"].repeat_interleave(2, 0))
    for row in range(2):
        alone = generate(model, row_of(inputs, row), num_beams=3, num_return_sequences=2)
        assert torch.equal(outputs.sequences[2 * row : 2 * row + 2, -6:], alone.sequences[:, -6:])
    transition = model.compute_transition_scores(outputs.sequences, outputs.scores, outputs.beam_indices)
    assert transition.shape == (4, 6) and torch.isfinite(transition).all()


def test_sampling_follows_the_seed(model):
    inputs, samples = video_inputs((4,)), []
    for _ in range(2):
        torch.manual_seed(3)
        samples.append(model.generate(**inputs, do_sample=True, num_return_sequences=3, max_new_tokens=5))
    assert torch.equal(*samples)
    assert samples[0].shape == (3, LENGTH + 5)
    assert len({tuple(row.tolist()) for row in samples[0]}) == 3


class Recorder(LogitsProcessor, StoppingCriteria, BaseStreamer):
    """Writes down what `generate` shows to its caller."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.clone())
        return scores

    def put(self, value):
        self.seen.append(value)

    def end(self):
        self.seen.append("end")


class StopAt(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length, dtype=torch.bool)


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_logits_processors_see_the_original_prompt(model, kwargs):
    inputs, recorder = video_inputs((4, 2)), Recorder()
    generate(model, inputs, num_new=3, logits_processor=[recorder], **kwargs)
    repeats = 2 if kwargs else 1
    assert [seen.shape[1] for seen in recorder.seen] == [LENGTH, LENGTH + 1, LENGTH + 2]
    for seen in recorder.seen:
        assert torch.equal(seen[:, :LENGTH], inputs["input_ids"].repeat_interleave(repeats, 0))


def test_stopping_criteria_see_the_original_prompt(model):
    outputs = generate(model, video_inputs((4,)), num_new=10, stopping_criteria=[StopAt(LENGTH + 4)])
    assert outputs.sequences.shape == (1, LENGTH + 4)


def test_streamer_gets_the_original_prompt_first(model):
    inputs, recorder = video_inputs((4,)), Recorder()
    outputs = generate(model, inputs, num_new=3, streamer=recorder)
    assert torch.equal(recorder.seen[0], inputs["input_ids"])
    assert torch.cat(recorder.seen[1:-1]).tolist() == outputs.sequences[0, LENGTH:].tolist()
    assert recorder.seen[-1] == "end"


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_prefix_function_sees_the_original_prompt(model, kwargs):
    inputs, seen = video_inputs((4, 2)), []

    def allow(batch_id, ids):
        seen.append((batch_id, ids[:LENGTH].tolist()))
        return [30, 31]

    outputs = generate(model, inputs, num_new=3, prefix_allowed_tokens_fn=allow, **kwargs)
    assert set(outputs.sequences[:, LENGTH:].flatten().tolist()) <= {30, 31}
    per_prompt = 2 if "do_sample" in kwargs and TRANSFORMERS < (5, 24) else 1
    assert {row for row, _ in seen} == set(range(2 * per_prompt))
    assert all(ids == inputs["input_ids"][row // per_prompt].tolist() for row, ids in seen)


def test_min_length_counts_the_original_prompt(model):
    model = copy.deepcopy(model)
    inputs = video_inputs((4,))
    free = generate(model, inputs, num_new=8).sequences[0, LENGTH:].tolist()
    eos = free[1]
    stopped = generate(model, inputs, num_new=8, eos_token_id=eos)
    assert stopped.sequences.shape[1] == LENGTH + 2 - (free[0] == eos)
    longer = generate(model, inputs, num_new=8, eos_token_id=eos, min_length=LENGTH + 5)
    assert longer.sequences.shape[1] >= LENGTH + 5


def test_max_length_within_the_prompt_is_refused(model):
    with pytest.raises(ValueError, match=rf"`max_length`={LENGTH - 20} leaves no room .* has {LENGTH} tokens"):
        model.generate(**video_inputs((4,)), max_length=LENGTH - 20)


@pytest.mark.parametrize("turn", ["full", "full with mask", "full with video", "new ids"])
@pytest.mark.parametrize("num_frames", [(4,), (4, 2)])
def test_second_turn_equals_from_scratch(model, turn, num_frames):
    inputs = video_inputs(num_frames)
    first = generate(model, inputs, num_new=4)
    assert first.past_key_values.get_seq_length() < inputs["input_ids"].shape[1]
    question = torch.tensor([[50, 51, 52]]).repeat(len(num_frames), 1)
    conversation = append(append(inputs, first.sequences[:, inputs["input_ids"].shape[1] :]), question)
    expected = generate(model, conversation, num_new=5)
    if turn == "full":
        second = {"input_ids": conversation["input_ids"]}
    elif turn == "new ids":
        second = {"input_ids": conversation["input_ids"][:, -4:], "attention_mask": conversation["attention_mask"]}
    elif turn == "full with video":
        second = conversation
    else:
        names = ("input_ids", "attention_mask", "mm_token_type_ids")
        second = {name: conversation[name] for name in names}
    outputs = generate(model, second, num_new=5, past_key_values=first.past_key_values)
    assert torch.equal(outputs.sequences[:, : second["input_ids"].shape[1]], second["input_ids"])
    assert torch.equal(outputs.sequences[:, -5:], expected.sequences[:, -5:])
    torch.testing.assert_close(torch.stack(outputs.logits), torch.stack(expected.logits), atol=1e-3, rtol=1e-3)


def test_third_turn_equals_from_scratch(model):
    conversation, cache = video_inputs((4,)), None
    for question in ([50, 51], [60, 61, 62], [70]):
        expected = generate(model, conversation, num_new=3)
        given = {name: conversation[name] for name in ("input_ids", "attention_mask")} if cache else conversation
        outputs = generate(model, given, num_new=3, **({"past_key_values": cache} if cache else {}))
        assert torch.equal(outputs.sequences, expected.sequences)
        cache = outputs.past_key_values
        new = outputs.sequences[:, conversation["input_ids"].shape[1] :]
        conversation = append(append(conversation, new), torch.tensor([question]))


def test_a_static_cache_can_be_reset_and_used_for_another_video(model):
    cache = generate(model, video_inputs((4,)), cache_implementation="static", max_new_tokens=20).past_key_values
    cache.reset()
    inputs = video_inputs((2,), seed=5)
    outputs = generate(model, inputs, past_key_values=cache)
    assert torch.equal(outputs.sequences, generate(model, inputs).sequences)


def test_a_prefix_may_be_cached_before_the_video(model):
    inputs = video_inputs((4,))
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=inputs["input_ids"][:, :2], past_key_values=cache, use_cache=True)
    outputs = generate(model, inputs, past_key_values=cache)
    assert torch.equal(outputs.sequences, generate(model, inputs).sequences)


def test_embeddings_can_be_given_instead_of_ids(model):
    inputs = video_inputs((4,))
    expected = generate(model, inputs).sequences[:, LENGTH:]
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(generate(model, inputs, inputs_embeds=embeddings).sequences, expected)


def test_a_second_video_on_a_filled_cache_is_refused(model):
    inputs = video_inputs((2,))
    cache = generate(model, inputs).past_key_values
    longer = append(inputs, inputs["input_ids"])
    with pytest.raises(ValueError, match="The cache holds a pruned prompt of 173 tokens.*no new video; got 346"):
        generate(model, longer, past_key_values=cache)


def test_continuous_batching_refuses_videos(model):
    with pytest.raises(ValueError, match="continuous batching"):
        model.generate(**video_inputs((2,)), cache_implementation="paged")


def test_encoded_features_are_not_pruned_again(model):
    inputs = video_inputs((4,))
    names = ("pixel_values_videos", "video_token_pooling", "video_grids")
    raw = {name: inputs.pop(name) for name in names}
    with torch.no_grad():
        unpruned = model.get_video_features(**raw, prune_ratio=0.0)
    outputs = generate(model, inputs, mm_encoder_outputs={"video": unpruned})
    expected = generate(model, inputs | raw, prune_ratio=0.0)
    assert torch.equal(outputs.sequences, expected.sequences)


def test_model_inputs_are_left_as_they_were(model):
    inputs = video_inputs((4,))
    before = {name: value.clone() for name, value in inputs.items()}
    generate(model, inputs)
    assert inputs.keys() == before.keys() and all(torch.equal(inputs[name], before[name]) for name in before)


# --- caches that change ---


def turn(model, conversation, cache, **kwargs):
    ids = {"input_ids": conversation["input_ids"], "attention_mask": conversation["attention_mask"]}
    return generate(model, ids, past_key_values=cache, **kwargs)


@pytest.mark.parametrize("kind", ["ratio 0", "text"])
def test_a_reset_cache_forgets_its_cut(model, kind):
    cache = generate(model, video_inputs((4,)), cache_implementation="static", max_new_tokens=200).past_key_values
    cache.reset()
    if kind == "text":
        inputs, kwargs = {"input_ids": torch.arange(20, 30)[None]}, {}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    else:
        inputs, kwargs = video_inputs((4,), seed=3), {"prune_ratio": 0.0}
    first = generate(model, inputs, num_new=3, past_key_values=cache, **kwargs)
    conversation = append(inputs, first.sequences[:, inputs["input_ids"].shape[1] :])
    expected = generate(model, conversation, num_new=4, **kwargs)
    assert torch.equal(turn(model, conversation, cache, num_new=4).sequences, expected.sequences)


def test_a_cache_cropped_to_a_prefix_forgets_its_cut(model):
    inputs, cache = video_inputs((4,)), DynamicCache()
    expected = generate(model, inputs, past_key_values=cache)
    cache.crop(2 - cache.get_seq_length())
    assert torch.equal(generate(model, inputs, past_key_values=cache).sequences, expected.sequences)


def test_a_cache_cropped_within_the_video_is_refused(model):
    inputs, cache = video_inputs((4,)), DynamicCache()
    generate(model, inputs, past_key_values=cache)
    cache.crop(150 - cache.get_seq_length())
    with pytest.raises(ValueError, match="The cache was cropped to 150 tokens, within a pruned prompt of 179"):
        generate(model, inputs, past_key_values=cache)


def test_a_second_turn_with_other_rows_is_refused(model):
    inputs, cache = video_inputs((4, 2)), DynamicCache()
    generate(model, inputs, past_key_values=cache)
    with pytest.raises(ValueError, match=r"holds 2 pruned prompts.* got \(1, 350\)"):
        model.generate(input_ids=torch.full((1, 350), 30), past_key_values=cache)
    with pytest.raises(ValueError, match="needs `input_ids` of as many rows.* got None"):
        model.generate(inputs_embeds=torch.zeros(2, 350, 32), past_key_values=cache)


def test_a_second_turn_recognises_padding_without_a_mask(model):
    inputs = video_inputs((4, 4))
    first = generate(model, inputs, num_new=4)
    sequences = first.sequences.clone()
    sequences[1, -2:] = PAD
    conversation = torch.cat([sequences, torch.tensor([[44, 45]] * 2)], 1)
    mask = (conversation != PAD).long()
    logits = [
        generate(model, given, num_new=1, past_key_values=copy.deepcopy(first.past_key_values)).logits[0]
        for given in ({"input_ids": conversation}, {"input_ids": conversation, "attention_mask": mask})
    ]
    assert torch.equal(*logits)


def test_lengths_count_the_original_prompt_with_embeddings_too(model):
    inputs = video_inputs((4,))
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert model.generate(**inputs, max_length=LENGTH + 5, do_sample=False).shape == (1, 5)


def test_a_given_processor_takes_the_place_of_the_default_of_its_type(model):
    inputs, given = video_inputs((4,)), [RepetitionPenaltyLogitsProcessor(3.0)]
    outputs = generate(
        model, inputs, num_new=1, logits_processor=given, repetition_penalty=2.0, output_scores=True, min_length=0
    )
    ratio = outputs.scores[0] / outputs.logits[0]
    assert ratio.max().item() == pytest.approx(3.0)


def test_wrapped_criteria_can_be_copied():
    wrapped = UncutStoppingCriteria(StopAt(3), None)
    assert copy.copy(wrapped).length == copy.deepcopy(wrapped).length == 3


def test_compiled_decoding_has_no_graph_break(model):
    inputs = video_inputs((2,))
    expected = generate(model, inputs, cache_implementation="static", disable_compile=True)
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    outputs = generate(model, inputs, cache_implementation="static", compile_config=config)
    assert torch.equal(outputs.sequences, expected.sequences)


def test_a_video_without_a_prompt_is_refused(model):
    inputs = video_inputs((2,))
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        inputs.pop(name)
    with pytest.raises(ValueError, match="A video needs its prompt"):
        model.generate(**inputs)


# --- videos that were encoded before ---


def encoded(model, inputs, prune_ratio):
    with torch.no_grad():
        return model.get_video_features(**{name: inputs.pop(name) for name in VIDEO_NAMES}, prune_ratio=prune_ratio)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3, "num_return_sequences": 2}])
@pytest.mark.parametrize("prune_ratio", [0.0, 0.6])
def test_encoded_videos_equal_raw_ones_again_and_again(model, prune_ratio, settings):
    inputs, settings = video_inputs((4, 2)), {"max_new_tokens": 4, "do_sample": False, **settings}
    expected = model.generate(**inputs, prune_ratio=prune_ratio, **settings)
    video = encoded(model, inputs, prune_ratio)
    for _ in range(2):
        assert torch.equal(model.generate(**inputs, video_features=[video], **settings), expected)


def test_parts_of_a_video_equal_the_video(model):
    inputs = video_inputs((4,))
    video = encoded(model, inputs, 0.6)
    num_kept = video.keep_masks[0][:3].sum().item()
    parts = [
        type(video)(pooler_output=(features,), keep_masks=(mask,), num_pruned=int((mask == 0).sum()))
        for features, mask in zip(video.pooler_output[0].tensor_split([num_kept]), video.keep_masks[0].split([3, 1]))
    ]
    settings = {"max_new_tokens": 4, "num_beams": 2}
    expected = model.generate(**inputs, video_features=[video], **settings)
    assert torch.equal(model.generate(**inputs, video_features=parts, **settings), expected)


def test_encoded_videos_beside_what_does_not_go_with_them_are_refused(model):
    raw, inputs = video_inputs((2,)), video_inputs((2,))
    video = encoded(model, inputs, 0.5)
    for extra in ({"prune_ratio": 0.5}, {"pixel_values_videos": raw["pixel_values_videos"]}):
        with pytest.raises(ValueError, match="`video_features` cannot be passed with"):
            model.generate(**inputs, video_features=[video], **extra)
    for features, given in (([], "list"), (video, "Molmo2SttsVideoFeatures")):
        with pytest.raises(ValueError, match=f"must be a list of at least one output, got {given}"):
            model.generate(**inputs, video_features=features)
    with pytest.raises(ValueError, match="hold 162 video tokens, but its videos have 324 windows"):
        model.generate(**inputs, video_features=[video, video])
