"""Which checkpoints can be merged tensor by tensor, and what of their configs differs without a tensor saying so."""

from __future__ import annotations

from collections.abc import Mapping

from evo.checkpoint import Checkpoint, CheckpointError, read_vocabulary
from evo.copies import tied_heads
from evo.encodings import Entry
from evo.encodings.plain import Plain
from search_spaces.layout import is_by_token

_SAME_WHERE_GIVEN = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "n_head", "n_heads", "multi_query",
    "activation_function", "hidden_activation", "use_parallel_residual", "parallel_attn", "alibi",
    "architectures", "tie_word_embeddings",
)  # fmt: skip
"""Keys of config.json that say what weights of the same shapes mean."""
_CONVERT = (
    "To convert one: AutoModelForCausalLM.from_pretrained(PATH, dtype='bfloat16').save_pretrained(NEW_PATH), "
    "with the dtype of the others."
)
_SAY_ONE = " (`mergefront merge` takes several, if its file says `dtype: bfloat16`, say.)"
_TOLD = (
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "max_position_embeddings",
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "sliding_window", "use_sliding_window", "layer_types",
    "num_experts_per_tok", "norm_topk_prob", "routed_scaling_factor", "scoring_func", "n_group", "topk_group",
    "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "rotary_pct", "rotary_emb_base",
    "embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling", "logit_scale",
)  # fmt: skip
"""Keys of config.json that change what a model computes. Parents that differ in them are merged by many, and well."""
_COMMON_ROWS = (
    "`vocabulary: common` (in a config or a recipe, or --common-vocabulary of `merge`) would merge the rows that all "
    "have, and take the others from the interface parent."
)


def check_compatible(checkpoints: Mapping[str, Checkpoint], *, common_rows: bool = False) -> None:
    """Refuse checkpoints that cannot be merged tensor by tensor.

    Args:
        checkpoints: by name.
        common_rows: let vocabularies differ by added and padded rows (see evo.vocabulary).

    Raises:
        CheckpointError: with the tensors, shapes, dtypes, architectures or vocabularies that differ.
    """
    (first_name, first), *others = checkpoints.items()
    problems: list[str] = []
    retyped: list[Entry] = []
    for name, other in others:
        problems += _config_differences(first_name, first, name, other)
        problems += _token_differences(first_name, first, name, other, common_rows)
        missing = [t for t in first.scored if t not in other.scored]
        extra = [t for t in other.scored if t not in first.scored]
        problems += [f"{t}: in {first_name}, not in {name}" for t in missing]
        problems += [f"{t}: in {name}, not in {first_name}" for t in extra]
        for tensor in first.scored.keys() & other.scored.keys():
            entries = (first.entries[tensor], other.entries[tensor])
            here, there = (f"{entry.encoding.output} {list(entry.shape)}" for entry in entries)
            if is_by_token(tensor) and _same_but_rows(*entries):
                if not common_rows and here != there:
                    low, high = sorted(entry.shape[0] for entry in entries)
                    owner = first_name if entries[0].shape[0] == high else name
                    problems.append(f"{tensor}: rows {low} to {high - 1} are in {owner} only. {_COMMON_ROWS}")
            elif here != there:
                problems.append(f"{tensor}: {here} in {first_name}, {there} in {name}")
                if entries[0].shape == entries[1].shape:
                    retyped += entries
    if problems:
        shown = "\n  ".join(sorted(problems)[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        say_one = _SAY_ONE if all(isinstance(entry.encoding.output, Plain) for entry in retyped) else ""
        advice_on_dtypes = f" {_CONVERT}{say_one}" if retyped else ""
        raise CheckpointError(
            f"these checkpoints cannot be merged, {len(problems)} difference(s):\n  {shown}{more}\n"
            f"Expected the same architecture, vocabulary, tensors, shapes and dtypes in all of them.{advice_on_dtypes}"
        )


def _config_differences(a_name: str, a: Checkpoint, b_name: str, b: Checkpoint) -> list[str]:
    here, there = a.settings(), b.settings()
    keys = ["model_type"]
    keys += [key for key in _SAME_WHERE_GIVEN if here.get(key) is not None and there.get(key) is not None]
    differences = [
        f"config.json {key}: {here.get(key)!r} in {a_name}, {there.get(key)!r} in {b_name}"
        for key in keys
        if here.get(key) != there.get(key)
    ]
    if not differences and None in (a.is_tied, b.is_tied) and (tied := tied_heads(a)) != tied_heads(b):
        owner, other = (a_name, b_name) if tied else (b_name, a_name)
        differences.append(
            f"the head is the embedding in {owner} (same bits, and not every config.json says whether they are tied), "
            f"and not in {other}: write tie_word_embeddings into both"
        )
    return differences


def _same_but_rows(a: Entry, b: Entry) -> bool:
    return a.shape[1:] == b.shape[1:] and a.encoding.output == b.encoding.output


def _token_differences(a_name: str, a: Checkpoint, b_name: str, b: Checkpoint, common_rows: bool) -> list[str]:
    differences, sizes = [], [c.config().get("vocab_size") for c in (a, b)]
    if sizes[0] != sizes[1] and not common_rows:
        differences.append(f"config.json vocab_size: {sizes[0]!r} in {a_name}, {sizes[1]!r} in {b_name}")
    here, there = (read_vocabulary(c.path) if c.has_interface else None for c in (a, b))
    if here is None or there is None:
        return differences
    changed = {token for token in {*here, *there} if here.get(token) != there.get(token)}
    only_here, only_there = changed - there.keys(), changed - here.keys()
    moved = changed - only_here - only_there
    taken = {here[t] for t in only_here} & set(there.values()) | {there[t] for t in only_there} & set(here.values())
    if moved or taken:
        differences.append(
            f"tokenizer.json: {len(changed)} token(s) have another id in {b_name} than in {a_name}: "
            + ", ".join(repr(token) for token in sorted(changed)[:5])
        )
    elif changed and not common_rows:
        for owner, vocabulary, tokens in ((a_name, here, only_here), (b_name, there, only_there)):
            shown = ", ".join(f"{vocabulary[t]} ({t!r})" for t in sorted(tokens, key=vocabulary.__getitem__)[:5])
            if tokens:
                differences.append(f"tokenizer.json: {len(tokens)} row(s) are in {owner} only: {shown}. {_COMMON_ROWS}")
    return differences


def differing_settings(checkpoints: Mapping[str, Checkpoint], interface: str) -> list[str]:
    """What to tell of keys of config.json that change what a model computes and are not the same in all.

    Args:
        checkpoints: by name.
        interface: the one whose config children get.
    """
    settings = {name: checkpoint.settings() for name, checkpoint in checkpoints.items()}
    found = []
    for key in _TOLD:
        values = {name: repr(config.get(key)) for name, config in settings.items()}
        if len(set(values.values())) > 1:
            said = ", ".join(f"{value} in {name}" for name, value in values.items())
            found.append(f"config.json {key}: {said}; merges get that of {interface!r}")
    return found
