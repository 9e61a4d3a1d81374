"""A tiny STORM or VILA with a tokenizer made on the spot: what the tests of model/ ask, save and load."""

import av
import numpy as np
import torch
from storm_model import (
    StormConfig,
    StormForConditionalGeneration,
    StormImageProcessor,
    StormProcessor,
    StormVideoProcessor,
)
from storm_model.processing_storm import IMAGE_TOKEN, VIDEO_TOKEN, chat_template
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast, SiglipVisionConfig

from storm_kernels import TokenReduction

IMAGE_SIZE = 56  # 4 x 4 patches, 2 x 2 tokens a frame
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message.content + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


def tokenizer(placeholders=True):
    """One token a byte, ChatML."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(sorted(letters))}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", *((IMAGE_TOKEN, VIDEO_TOKEN) if placeholders else ())]
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    made.add_special_tokens({"additional_special_tokens": special})
    return made


def vision_config(**changes):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return SiglipVisionConfig(**sizes | {"image_size": IMAGE_SIZE, "patch_size": 14} | changes)


def text_config(family="qwen2", **changes):
    return AutoConfig.for_model(family, **SIZES | {"vocab_size": 264} | changes)


def config(family="qwen2", text=None, vision=None, **changes):
    words = tokenizer()
    ids = {
        "image_token_id": words.convert_tokens_to_ids(IMAGE_TOKEN),
        "video_token_id": words.convert_tokens_to_ids(VIDEO_TOKEN),
    }
    parts = {"vision_config": vision_config(**vision or {}), "text_config": text_config(family, **text or {})}
    return StormConfig(**parts | ids | {"projector_layers": 2} | changes)


def model(seed=0, **changes):
    """With random weights from the seed; the projector's tokens are as large as the embeddings, so that they matter."""
    torch.manual_seed(seed)
    made = StormForConditionalGeneration(config(**changes)).eval()
    with torch.no_grad():
        for parameter in made.model.language_model.parameters():
            parameter.mul_(4)
    return made


def processor(frame_separator="", **changes):
    sizes = {"image_size": IMAGE_SIZE, "patch_size": 14} | changes
    words = tokenizer()
    parts = (StormImageProcessor(**sizes), words, StormVideoProcessor(**sizes))
    return StormProcessor(*parts, chat_template=chat_template(words), frame_separator=frame_separator)


def save(folder, **changes):
    """A folder as a user has it: model, tokenizer, processor, chat template."""
    model(**changes).save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


def clip(path, frames=20, fps=10, size=(64, 48), seed=0):
    """A short video of noise that changes slowly."""
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=fps)
        stream.width, stream.height = size
        for _ in range(frames):
            small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
            picture = np.ascontiguousarray(np.kron(small, np.ones((size[1] // 6, size[0] // 8, 1), np.uint8)))
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        out.mux(stream.encode())
    return path


def pixels(*frames, seed=0):
    """Random videos of so many frames each, as the tower takes them."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(n, 3, 56, 56, generator=generator) * 2 - 1 for n in frames]


def prompt(config, *frames, reduction=(1, 1, 1), text=5):
    """One text: the placeholders of every video, then letters."""
    tokens = [TokenReduction(*reduction).reduced(config.token_grid(n)).tokens for n in frames]
    return torch.tensor([[config.video_token_id] * sum(tokens) + list(range(40, 40 + text))])


def inputs(config, *frames, reduction=(1, 1, 1), seed=0):
    """What a model takes for one prompt with a video of so many frames each."""
    return {
        "input_ids": prompt(config, *frames, reduction=reduction),
        "pixel_values_videos": pixels(*frames, seed=seed),
        "video_reductions": torch.tensor([reduction] * len(frames)),
    }


def greedy(model, given, n=6, **options):
    """The n likeliest next tokens, one after the other."""
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    return model.generate(**given, max_new_tokens=n, **options)[:, given["input_ids"].shape[1] :]
