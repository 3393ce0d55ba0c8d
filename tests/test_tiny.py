import pytest
import torch

from hub_upload.tiny import tiny_config, tiny_model, tiny_processor, tiny_tokenizer


TOKEN_FIELDS = {
    "image_start_token_id": "<im_start>",
    "low_res_image_start_token_id": "<low_res_im_start>",
    "image_end_token_id": "<im_end>",
    "image_patch_id": "<im_patch>",
    "frame_start_token_id": "<frame_start>",
    "frame_end_token_id": "<frame_end>",
}


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(tiny_config())


def prompt(processor, content):
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def test_special_token_ids_of_config_and_tokenizer_agree():
    config, tokenizer = tiny_config(), tiny_tokenizer()
    for field, token in TOKEN_FIELDS.items():
        assert getattr(config, field) == tokenizer.convert_tokens_to_ids(token)


def test_vocabulary_matches_the_embeddings():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert model.lm_head.out_features == model.config.text_config.vocab_size < len(tokenizer)
    assert max(model.generation_config.eos_token_id, model.generation_config.pad_token_id) < model.lm_head.out_features


@pytest.mark.parametrize("text", ["What happens?", "  two  spaces\n", "Grüße, 世界 🎬", "it's 3.5"])
def test_tokenizer_gives_any_text_back(text):
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text.encode())


def test_chat_template(processor):
    end = "<|im_end|>\n<|im_start|>assistant\n"
    parts = [{"type": "video"}, {"type": "image"}, {"type": "text", "text": "Hi"}]
    assert prompt(processor, "Hi") == "<|im_start|>user\nHi" + end
    assert prompt(processor, parts) == "<|im_start|>user\n<|video|><|image|>Hi" + end


def test_processor_makes_81_tokens_a_frame(processor):
    text = prompt(processor, [{"type": "video"}, {"type": "text", "text": "Hi"}])
    video = torch.randint(0, 255, (5, 3, 40, 60), dtype=torch.uint8)
    inputs = processor(text=text, videos=[video], do_sample_frames=False, return_tensors="pt")
    assert (inputs["input_ids"] == tiny_config().image_patch_id).sum() == 5 * 81
    assert inputs["pixel_values_videos"].shape == (5, 729, 12)
    assert inputs["video_token_pooling"].shape == (5 * 81, 9)
    assert inputs["video_grids"].tolist() == [[5, 9, 9]]


def test_processor_takes_at_most_8_frames(processor):
    video = torch.zeros(100, 3, 8, 8, dtype=torch.uint8)
    inputs = processor.video_processor([video], return_tensors="pt")
    assert len(inputs["pixel_values_videos"]) == 8


def test_images_fit_the_model(processor):
    text = prompt(processor, [{"type": "image"}, {"type": "text", "text": "Hi"}])
    inputs = processor(text=text, images=[torch.zeros(3, 54, 54, dtype=torch.uint8)], return_tensors="pt")
    with torch.no_grad():
        logits = tiny_model()(**inputs).logits
    assert logits.shape == (*inputs["input_ids"].shape, tiny_config().text_config.vocab_size)


def test_weights_depend_on_the_seed_alone():
    random_state = torch.get_rng_state()
    first, again, other = tiny_model(), tiny_model(), tiny_model(weight_seed=1)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_stts_fields_reach_the_configuration():
    assert tiny_config(prune_ratio=0.7, method="random").stts_config.prune_ratio == 0.7
    assert tiny_model(position_ids="compact").config.stts_config.position_ids == "compact"
    with pytest.raises(ValueError, match="prune_ratio"):
        tiny_config(prune_ratio=1.0)
