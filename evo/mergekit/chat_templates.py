"""Chat templates that mergekit's YAML may name.

Only those that are one format: `mistral` has been several, and `alpaca` and `exaone` are mergekit's own readings.
"""

from __future__ import annotations

AUTO = "auto"
"""The one that most of a merge's models have."""
CHAT_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
        "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
}
"""ChatML as Qwen2 writes it, without a system message of its own, and Meta's of Llama 3 (its model card, "Prompt
Template"), whose turns have no newline between them; mergekit's has one."""
