"""Tiny folders as people have them: SigLIP checkpoints, language models, a VILA folder; all made on the spot."""

import json

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionModel,
)

from tests.support import ask_model

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}  # fmt: skip
LAYERS = 3  # of the tower; the projector reads the last but one


def siglip(folder, dtype=torch.float32, text_half=False, **changes):
    """A tower by itself, or as google/siglip-* are published: with the text half, and pooling heads."""
    torch.manual_seed(0)
    vision = ask_model.vision_config(**{"num_hidden_layers": LAYERS} | changes)
    if text_half:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        text = SiglipTextConfig(**sizes, vocab_size=50, projection_size=32)
        model = SiglipModel(SiglipConfig(vision_config=vision.to_dict(), text_config=text.to_dict()))
    else:
        model = SiglipVisionModel(vision)
    model.to(dtype).save_pretrained(folder)
    SiglipImageProcessor(size={"height": vision.image_size, "width": vision.image_size}).save_pretrained(folder)
    return folder


def language(folder, family="qwen2", dtype=torch.bfloat16, placeholders=False, shards=None, **changes):
    """A causal language model with its tokenizer, which knows of no videos."""
    torch.manual_seed(1)
    config = ask_model.text_config(family, **changes)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    model.generation_config.eos_token_id = 3
    model.save_pretrained(folder, **{"max_shard_size": shards} if shards else {})
    ask_model.tokenizer(placeholders).save_pretrained(folder)
    return folder


def vila(folder, pooling=None, vision=None, **changes):
    """A folder of VILA's layout: three parts and a configuration of their whole."""
    siglip(folder / "vision_tower", torch.bfloat16, **vision or {})
    language(folder / "llm", num_key_value_heads=4)
    generator = torch.Generator().manual_seed(2)
    shapes = {"1.weight": (128,), "1.bias": (128,), "2.weight": (32, 128), "2.bias": (32,)}
    shapes |= {"4.weight": (32, 32), "4.bias": (32,)}
    tensors = {f"layers.{name}": torch.randn(*shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    (folder / "mm_projector").mkdir()
    save_file(tensors, folder / "mm_projector" / "model.safetensors", metadata={"format": "pt"})
    kind = {"model_type": "v2l_projector", "mm_projector_type": "mlp_downsample_2x2_fix"}
    (folder / "mm_projector" / "config.json").write_text(json.dumps(kind))
    config = {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaModel"],
        "llm_cfg": {},
        "vision_tower_cfg": {},
        "mm_projector_cfg": kind,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "cls_patch",
        "mm_use_im_start_end": False,
        "image_aspect_ratio": "resize",
        "num_video_frames": 6,
        "s2": False,
        "dynamic_s2": False,
        "image_encoder": json.dumps({"_target_": "llava.model.encoders.BasicImageEncoder"}),
        "video_encoder": json.dumps({"_target_": "llava.model.encoders.BasicVideoEncoder"}),
    }
    if pooling is not None:
        target = {"_target_": "llava.model.encoders.TSPVideoEncoder", "pool_sizes": pooling}
        config["video_encoder"] = json.dumps(target)
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def edit_tensors(file, change):
    """Change the tensors of a safetensors file in place."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_json(path, **changes):
    """Change fields of a JSON file in place."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
