"""Prompts -> completions: vision and prompt once per prompt, finished completions dropped, stops looked for rarely.

All prompts go through the model as one packed stream, without padding. Then every completion is a row that asks its
prompt's keys and its own (rollout/rows.py). On a GPU a step is a captured graph (rollout/captured.py).
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from medrl import stopping
from medrl.errors import PolicyError
from medrl.phases import phase
from medrl.policy.layout import pack
from medrl.policy.logprobs import head_logits
from medrl.policy.packed_attention import BACK_ENDS
from medrl.policy.policy import EncodedPrompt, Policy
from medrl.rollout.captured import PROMPT_BLOCK, CapturedDecoder, Graphs, bucket
from medrl.rollout.rows import Decoder, Prompts, Recorder, Rows, tabulate
from medrl.rollout.sampling import Sampling, uniforms
from medrl.types import Completion, Prompt

log = logging.getLogger(__name__)
COMPACT_BELOW = 0.75
"""Finished rows are cut out once fewer than this share of the rows is still writing."""
CHECK_EVERY = {"cpu": 1, "cuda": 8}
"""Tokens between two looks at who has finished: on a GPU each look waits for all work that was handed over."""


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    group_size: int = 1,
    seed: int = 0,
    step: int = 0,
    encoded: Sequence[EncodedPrompt] | None = None,
) -> list[list[Completion]]:
    """Complete each prompt ``group_size`` times.

    What is drawn for a prompt depends on (seed, step, prompt id, completion index) alone, not on the rest of the batch.

    Args:
        encoded: the prompts as ``policy.encode`` made them, when the caller has them already.

    Returns:
        For each prompt, its completions in order.
    """
    if not prompts:
        return []
    encoded = encoded or policy.encode(prompts, room_tokens=sampling.max_new_tokens)
    uniform = torch.tensor(
        [
            uniforms(seed, step, prompt.id, index, sampling.max_new_tokens).tolist()
            for prompt in prompts
            for index in range(group_size)
        ],
        dtype=torch.float64,
        device=policy.device,
    )  # (N * G, limit)
    tokens, logprobs = _decode_what_fits(policy, encoded, sampling, group_size, uniform)
    completions = [
        Completion(
            text=policy.decode(token_ids),
            token_ids=tuple(token_ids),
            finish_reason="stop" if token_ids[-1] in policy.stop_token_ids else "length",
            mode=prompts[row // group_size].mode,
            sampling_logprobs=tuple(values),
        )
        for row, (token_ids, values) in enumerate(zip(tokens, logprobs, strict=True))
    ]
    return [completions[start : start + group_size] for start in range(0, len(completions), group_size)]


def _decode_what_fits(
    policy: Policy, encoded: Sequence[EncodedPrompt], sampling: Sampling, group_size: int, uniform: Tensor
) -> tuple[list[list[int]], list[list[float]]]:
    """All prompts together; where memory runs out, half of them after the other half, again and again."""
    try:
        return _decode(policy, encoded, sampling, group_size, uniform)
    except torch.OutOfMemoryError as error:
        if len(encoded) == 1:
            raise PolicyError(
                f"the memory is too small for {group_size} completions of example {encoded[0].id} alone "
                f"({len(encoded[0].token_ids)} prompt tokens, up to {sampling.max_new_tokens} new ones): lower "
                "policy.max_pixels, grpo.group_size or sampling.max_new_tokens"
            ) from error
    # Outside of the handler, whose traceback holds the tensors of what failed.
    log.warning("out of memory while completing %d prompts together: half of them at a time", len(encoded))
    policy.decode_graphs = None
    if policy.device.type == "cuda":
        torch.cuda.empty_cache()
    half = len(encoded) // 2
    tokens: list[list[int]] = []
    logprobs: list[list[float]] = []
    for part in (slice(None, half), slice(half, None)):
        rows = slice(None, half * group_size) if part.start is None else slice(half * group_size, None)
        more = _decode_what_fits(policy, encoded[part], sampling, group_size, uniform[rows])
        tokens, logprobs = tokens + more[0], logprobs + more[1]
    return tokens, logprobs


def _decode(
    policy: Policy, encoded: Sequence[EncodedPrompt], sampling: Sampling, group_size: int, uniform: Tensor
) -> tuple[list[list[int]], list[list[float]]]:
    """Token ids and log-probabilities of N * G completions, each up to and including its end-of-turn token."""
    limit, device = sampling.max_new_tokens, policy.device
    with phase("prefill"):
        logits, prompts = prefill(policy, encoded)  # (N, V)
        rows = _begin(policy, encoded, prompts, group_size, uniform)
    total = len(rows.here)
    written = torch.zeros(total, limit, dtype=torch.long, device=device)
    logprobs = torch.zeros(total, limit, device=device)
    lengths = torch.full((total,), limit, device=device)

    def keep_what_is_written(rows: Rows) -> None:
        written[rows.here], logprobs[rows.here], lengths[rows.here] = rows.written, rows.logprobs, rows.lengths

    with phase("decode"):
        stopping.check()
        Decoder(policy, sampling, rows).draw(logits.repeat_interleave(group_size, dim=0))
        decoder = _open(policy, sampling, rows) if limit > 1 else None
        every = CHECK_EVERY.get(device.type, 1)
        for t in range(1, limit):
            stopping.check()  # between two steps, so that a capture is always whole
            assert decoder is not None
            if t % every == 0:
                alive = (~decoder.rows.ended).nonzero().squeeze(1)
                if len(alive) == 0:
                    break
                fewer = _size(len(alive), len(decoder.rows.here), device)
                if fewer is not None:
                    keep_what_is_written(decoder.rows)
                    # A bucket that is not full is filled up with a row it has already.
                    filled = torch.cat([alive, alive[:1].expand(fewer - len(alive))])
                    decoder = _open(policy, sampling, decoder.rows.pick(filled))
            decoder.step()
        keep_what_is_written(decoder.rows if decoder is not None else rows)
    counts = lengths.tolist()
    return (
        [row[:n] for row, n in zip(written.tolist(), counts, strict=True)],
        [row[:n] for row, n in zip(logprobs.tolist(), counts, strict=True)],
    )


def _open(policy: Policy, sampling: Sampling, rows: Rows) -> Decoder | CapturedDecoder:
    if policy.device.type != "cuda":
        return Decoder(policy, sampling, rows)
    if not isinstance(policy.decode_graphs, Graphs):
        policy.decode_graphs = Graphs()
    return policy.decode_graphs.open(policy, sampling, rows)


def _size(alive: int, rows: int, device: torch.device) -> int | None:
    """How many rows to go on with; None: as many as there are."""
    size = bucket(alive, rows) if device.type == "cuda" else alive
    return size if size < COMPACT_BELOW * rows else None


def prefill(policy: Policy, encoded: Sequence[EncodedPrompt]) -> tuple[Tensor, Prompts]:
    """Run every prompt once, all in one stream: (N, V) logits after each, and its keys and values."""
    # A completion of one token adds nothing to the stream, and its predictor is the prompt's last token.
    layout = pack([prompt.positions for prompt in encoded], [[1]] * len(encoded)).to(policy.device)
    recorder = Recorder()
    embedded = policy.embed_prompts(encoded)  # (sum of P, H)
    visibility = BACK_ENDS[policy.attention](layout)
    hidden = policy.family.hidden(embedded[None], layout.positions[:, None], visibility, recorder)[0]
    logits = head_logits(hidden[layout.predictor], policy.family.head)
    lengths = torch.tensor(layout.prompt_lengths, device=policy.device)[:, None]
    block = PROMPT_BLOCK if policy.device.type == "cuda" else 1
    inside = torch.arange(-(-max(layout.prompt_lengths) // block) * block, device=policy.device)
    mask = inside < lengths  # (N, P)
    starts = lengths.cumsum(0) - lengths
    index = (starts + inside).where(mask, starts)
    keys, values = (
        torch.stack([layer[:, index].transpose(0, 1) for layer in layers])
        for layers in (recorder.keys, recorder.values)
    )
    return logits, Prompts(keys=keys, values=values, mask=mask[:, None, None])


def _begin(
    policy: Policy, encoded: Sequence[EncodedPrompt], prompts: Prompts, group_size: int, uniform: Tensor
) -> Rows:
    """Rows before their first token."""
    device, (total, limit) = policy.device, uniform.shape
    layers, kv_heads, width = policy.family.cache_shape
    keys = torch.zeros(layers, total, kv_heads, limit, width, dtype=prompts.keys.dtype, device=device)
    groups = [n for n in range(len(encoded)) for _ in range(group_size)]
    table, place = tabulate(groups, list(range(total)), torch.Size((len(encoded), group_size)), device)
    # One before the first: drawing a token moves on to its position.
    start = torch.tensor([prompt.next_position - 1 for prompt in encoded], device=device)
    return Rows(
        prompts=prompts,
        table=table,
        place=place,
        keys=keys,
        values=torch.zeros_like(keys),
        here=torch.arange(total, device=device),
        tokens=torch.zeros(total, dtype=torch.long, device=device),
        positions=start.repeat_interleave(group_size).expand(3, -1)[..., None].clone(),
        uniform=uniform,
        written=torch.zeros(total, limit, dtype=torch.long, device=device),
        logprobs=torch.zeros(total, limit, device=device),
        lengths=torch.full((total,), limit, device=device),
        t=torch.zeros(1, dtype=torch.long, device=device),
    )
