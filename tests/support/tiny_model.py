"""A model small enough for any test, of the main job and of the GPU script."""

from storm_model import StormConfig
from transformers import Qwen2Config, SiglipVisionConfig

TINY = StormConfig(
    name_or_path="tiny",
    vision_config=SiglipVisionConfig(
        image_size=56, patch_size=14, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    ),
    text_config=Qwen2Config(
        num_hidden_layers=1, hidden_size=64, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=128, vocab_size=512, max_position_embeddings=4096, eos_token_id=None,
    ),
    projector_layers=1,
    image_token_id=510,
    video_token_id=511,
)  # fmt: skip
