"""The policy: a vision-language model, its processor, and the few things training asks of them.

policy = Policy.load("Qwen/Qwen2-VL-2B-Instruct")
encoded = policy.encode(prompts)
scored = policy.logprobs(encoded, completions)      # one packed pass, image and prompt once per group
"""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from PIL.Image import new as new_image
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from medrl.errors import PolicyError, PromptTooLongError
from medrl.phases import phase
from medrl.policy import lora
from medrl.policy.encoding import EncodedPrompt, EncodedPrompts, Encoder, Encodes
from medrl.policy.families import FAMILIES
from medrl.policy.features import FrozenFeatures, together
from medrl.policy.fused import Kernels, head_is_fused, head_kernels
from medrl.policy.layers import (
    Compilation,
    checkpoint_activations,
    choose_compilation,
    compile_layers,
    compiling,
    keep_in_main_memory,
    naming_cuts,
)
from medrl.policy.layout import Layout, pack
from medrl.policy.loading import (
    Dtype,
    PolicySettings,
    check_folder,
    check_trainable,
    check_weights,
    from_hub,
    resolve_model,
    set_pixel_bounds,
)
from medrl.policy.logprobs import HALF, token_logprobs
from medrl.policy.lora import Lora, WithoutAdapters, add_lora, has_lora, load_lora, merged_state, save_lora
from medrl.policy.packed_attention import BACK_ENDS, choose_back_end
from medrl.policy.transfer import bring
from medrl.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredCompletions:
    """What a forward pass says of R completions."""

    logprobs: Tensor
    """(R, T) nats, with gradient."""
    entropy: Tensor
    """(R, T) nats, of the distribution each token was drawn from, with gradient."""
    completion_mask: Tensor
    """(R, T) 1 = counts."""


class Policy:
    """A model that completes prompts. Make one with ``Policy.load``, or from parts that are already in memory."""

    def __init__(self, model: Any, processor: Any, *, source: str | None = None, attention: str = "auto") -> None:
        model_type = model.config.model_type
        if model_type not in FAMILIES:
            raise PolicyError(
                f"models of type {model_type!r} are not supported; supported: {', '.join(sorted(FAMILIES))}"
            )
        self.model = model
        self.processor = processor
        self.source = source
        self.family = FAMILIES[model_type](model)
        self.attention = choose_back_end(attention, self.family.head, self.family.cache_shape[-1])
        """Back end of packed attention; never ``auto``: the choice is made once, here."""
        self.trained = False
        """Whether the weights have moved since they were loaded: ``source`` is then no longer where they are from."""
        self.compiled = False
        """Whether the layers are compiled."""
        self.kernels: Kernels = "auto"
        """Whether to use fused kernels, as asked."""
        self.head_fused: bool | None = None
        """Whether the head does; None: not chosen yet."""
        self.decodes_fused: bool | None = None
        """Whether decoding does; None: the rollout engine has not chosen yet."""
        self.decode_graphs: object = None
        """What the rollout engine captured for this policy on a GPU."""
        self.tokens_at_once: int | None = None
        """Tokens of completions that are made room for at a time, at most; None: memory never ran out with more."""
        self._features = FrozenFeatures()
        self._weights_rest = False
        self._reference: Policy | None = None
        self._remembered = EncodedPrompts()

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        dtype: Dtype = "float32",
        device: str | torch.device | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        attention: str = "auto",
    ) -> "Policy":
        """Open a model folder, a hub id, or ``demo-base``. Raises ``PolicyError`` naming what is missing."""
        source = resolve_model(str(source))
        folder = Path(source)
        if folder.is_dir():
            check_folder(folder)
        elif folder.is_absolute() or source.startswith(".") or source.count("/") > 1:
            raise PolicyError(f"there is no model folder {source}: give a folder that holds config.json, or a hub id")
        config = from_hub(AutoConfig, source)
        if config.model_type not in FAMILIES:
            raise PolicyError(
                f"{source} is a model of type {config.model_type!r}; supported: {', '.join(sorted(FAMILIES))}"
            )
        processor = from_hub(AutoProcessor, source)
        set_pixel_bounds(processor, min_pixels, max_pixels)
        model, loaded = from_hub(
            AutoModelForImageTextToText,
            source,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
        )
        check_weights(source, loaded["missing_keys"])
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(model.eval(), processor, source=source, attention=attention)

    def save(self, folder: Path) -> None:
        """Write a folder that plain transformers opens: safetensors weights, config, processor, chat template.

        Adapters are merged into the weights, and also lie beside them as they are (``adapter/``, in peft's format).
        """
        folder.mkdir(parents=True, exist_ok=True)
        with self.using_attention("sdpa"):
            if has_lora(self.model):
                self.model.save_pretrained(folder, state_dict=merged_state(self.model))
                save_lora(self.model, folder / lora.FOLDER)
            else:
                self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def fingerprint(self) -> str:
        """16 hex digits over every weight, bit by bit."""
        digest = hashlib.blake2b(digest_size=8)
        for name, parameter in self.model.named_parameters():
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    @property
    def device(self) -> torch.device:
        return self.family.head.device

    @property
    def eos_token_id(self) -> int:
        """Ends the policy's turn in its chat template; what supervised training teaches."""
        return int(self.processor.tokenizer.eos_token_id)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a completion: the turn's end, and those of the model's generation config."""
        also = self.model.generation_config.eos_token_id
        return tuple(sorted({self.eos_token_id, *(also if isinstance(also, list) else [] if also is None else [also])}))

    @property
    def reference(self) -> "Policy":
        """The frozen start of training, loaded again from where this policy came from."""
        if self._reference is None:
            if self.source is None:
                raise PolicyError(
                    "this policy was built in memory, so its start cannot be loaded again: "
                    "call freeze_reference() before training, or save() it and load the folder"
                )
            dtype = str(self.family.head.dtype).removeprefix("torch.")
            reference = Policy.load(self.source, dtype=dtype, device=self.device, attention=self.attention)  # type: ignore[arg-type]
            self._adopt_reference(reference)
        assert self._reference is not None
        return self._reference

    def freeze_reference(self, source: str | None = None) -> None:
        """Remember the start of training: the weights of ``source``, or a copy of the present ones."""
        if source is not None:
            self.source, self._reference = source, None
            return
        self._adopt_reference(Policy(copy.deepcopy(self.model), self.processor, attention=self.attention))

    def _adopt_reference(self, reference: "Policy") -> None:
        reference.processor, reference.head_fused = self.processor, self._fuses_head()
        reference.model.requires_grad_(False)
        if self.compiled:
            reference.compile_layers()
        ours, theirs = self.family.vision, reference.family.vision
        same = all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
        if self.family.vision_frozen and same:
            # One tower for both, and what it saw once is known to both.
            reference.model.model.visual = ours
            reference._features = self._features
        self._reference = reference

    def add_lora(self, settings: Lora) -> None:
        """Train adapters instead of the weights; the reference is this model with its adapters off."""
        add_lora(self.model, settings)
        reference = copy.copy(self)
        reference.decode_graphs = None  # captured with adapters on
        reference.family = WithoutAdapters(self.family)  # type: ignore[assignment]  # all that is used of one
        self._reference = reference

    def offload_reference(self) -> None:
        """Keep the reference's layers in main memory, and bring each to the device for as long as it computes."""
        reference = self.reference
        if reference.model is self.model:
            raise PolicyError(
                "the reference of a policy with adapters is the policy without them, so there is nothing to offload: "
                "set scale.offload_reference to false"
            )
        shared = {id(parameter) for parameter in self.model.parameters()}
        layers = [*reference.family.layers, *reference.family.vision_blocks]
        keep_in_main_memory(
            [layer for layer in layers if not any(id(p) in shared for p in layer.parameters())], self.device
        )

    def checkpoint_activations(self) -> None:
        """Keep only the inputs of layers for the backward pass: less memory, about a third more time."""
        checkpoint_activations([*self.family.layers, *self.family.vision_blocks])

    def compile_layers(self, wanted: Compilation = True, backend: str = "inductor", *, to_train: bool = True) -> None:
        """Compile the layers, for the training pass and for decoding, where ``choose_compilation`` says so.

        That takes about a minute, here, so that what cannot be compiled shows before a step is taken. Raises
        ``PolicyError`` with the compiler's reason.

        Args:
            to_train: compile the backward pass too.
        """
        if not choose_compilation(wanted, self.device):
            return
        for layers in (self.family.layers, self.family.vision_blocks):
            compile_layers(layers, backend)
        self.compiled = True
        with compiling(), naming_cuts():
            self._compile_now(to_train)

    def _compile_now(self, to_train: bool) -> None:
        """Take an image and two completions there and back; nothing is kept of it."""
        first = next(iter(p for p in self.model.parameters() if p.requires_grad and to_train), None)
        encoded = [self.encode_turn("first", "", [new_image("RGB", (56, 56))])]
        with torch.set_grad_enabled(first is not None):
            scored = self.logprobs(encoded, [[[0, 0, 0], [0, 0]]])
        if first is not None:
            torch.autograd.grad(scored.logprobs.sum(), [first])

    def encode(self, prompts: Sequence[Prompt], *, room_tokens: int = 0) -> list[EncodedPrompt]:
        """Tokenize prompts and prepare their images, each once.

        Args:
            room_tokens: completion tokens that must still fit into the context.

        Raises:
            PromptTooLongError: a prompt does not fit; image tokens are never cut to make it fit.
            ImageError: an image cannot be decoded.
        """
        # Two examples may ask the same thing of the same image; each keeps its own name.
        with phase("data"):
            encoded = [replace(self._remembered.get(p) or self._encode(p), id=p.id) for p in prompts]
        for prompt in encoded:
            self._check_fits(prompt, room_tokens)
        return encoded

    @property
    def encoder(self) -> Encoder:
        """What encodes prompts for this policy, apart from its model. It shares the policy's processor."""
        return Encoder(
            processor=self.processor, image_token_id=self.family.image_token_id, merge_size=self.family.merge_size
        )

    def prepare(self, prompt: Prompt, encoder: Encodes) -> None:
        """Have encoded what ``encode`` will be asked for soon; from another thread, with an encoder of its own."""
        if self._remembered.get(prompt) is None:
            self._remembered.add(prompt, self._staged(encoder.encode(prompt)))

    def _encode(self, prompt: Prompt) -> EncodedPrompt:
        encoded = self._staged(self.encoder.encode(prompt))
        self._remembered.add(prompt, encoded)
        return encoded

    def _staged(self, encoded: EncodedPrompt) -> EncodedPrompt:
        """Pixels in the model's precision where that is half, and where a GPU copies from while Python goes on.

        They travel three times in a step, for rollouts, reference and update: 195 MB each time in float32, for eight
        images of 1,008 pixels.
        """
        if encoded.pixels is None:
            return encoded
        dtype = self.family.head.dtype
        pixels = encoded.pixels.to(dtype) if dtype in HALF else encoded.pixels
        return replace(encoded, pixels=pixels.pin_memory() if self.device.type == "cuda" else pixels)

    def forget_prompts(self) -> None:
        """Encode every prompt anew when it comes again."""
        self._remembered.clear()

    def _check_fits(self, prompt: EncodedPrompt, room_tokens: int) -> None:
        limit, length = self.family.context_tokens, len(prompt.token_ids)
        if length + room_tokens > limit:
            raise PromptTooLongError(
                f"prompt {prompt.id}: {length} tokens and room for {room_tokens} more do not fit the context of "
                f"{limit}: lower max_new_tokens, or max_pixels (its images take "
                f"{int((prompt.token_ids == self.family.image_token_id).sum())} tokens)"
            )

    def encode_turn(self, id: str, text: str, images: Sequence[Image]) -> EncodedPrompt:
        """One user turn, images first, as the chat template writes it with the assistant's turn begun."""
        return self.encoder.encode_turn(id, text, images)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a completion; the token that ended it is left out, every other special token is shown."""
        kept = list(token_ids[:-1] if token_ids and token_ids[-1] in self.stop_token_ids else token_ids)
        return self.processor.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def tokenize(self, completion: str) -> list[int]:
        """Token ids of a completion text, end-of-turn token included: what supervised training aims at."""
        return [*self.processor.tokenizer(completion, add_special_tokens=False)["input_ids"], self.eos_token_id]

    def layout(self, encoded: Sequence[EncodedPrompt], completions: Sequence[Sequence[Sequence[int]]]) -> Layout:
        """The packed stream of these groups."""
        lengths = [[len(token_ids) for token_ids in group] for group in completions]
        return pack([prompt.positions for prompt in encoded], lengths).to(self.device)

    def logprobs(
        self,
        encoded: Sequence[EncodedPrompt],
        completions: Sequence[Sequence[Sequence[int]]],
        *,
        temperature: float = 1.0,
    ) -> ScoredCompletions:
        """Log-probabilities of completions in one packed pass: every image and prompt is computed once, with gradient.

        Args:
            encoded: N prompts.
            completions: for each prompt, the token ids of its completions; R in all, group by group.
        """
        layout = self.layout(encoded, completions)
        flat = [token for group in completions for token_ids in group for token in token_ids]
        targets = bring(torch.tensor(flat), self.device)  # (M,)
        inputs = [token for group in completions for token_ids in group for token in token_ids[:-1]]
        embedded = self._embed_stream(encoded, bring(torch.tensor(inputs, dtype=torch.long), self.device), layout)
        visibility = BACK_ENDS[self.attention](layout)
        hidden = self.family.hidden(embedded[None], layout.positions[:, None], visibility)[0]  # (T, H)
        logprobs, entropy = token_logprobs(
            hidden[layout.predictor],
            self.family.head,
            targets,
            temperature=temperature,
            kernels=head_kernels() if self._fuses_head() else None,
        )  # (M,)
        return ScoredCompletions(
            logprobs=layout.spread(logprobs),
            entropy=layout.spread(entropy),
            completion_mask=layout.completion_mask,
        )

    def _fuses_head(self) -> bool:
        if self.head_fused is None:
            self.head_fused = head_is_fused(self.kernels, self.device, self.family.head.dtype)
        return self.head_fused

    def _embed_stream(self, encoded: Sequence[EncodedPrompt], completion_ids: Tensor, layout: Layout) -> Tensor:
        prompts = self.embed_prompts(encoded)  # (sum of P, H)
        both = torch.cat([prompts, self.family.embed(completion_ids)])
        places = torch.cat([layout.prompt_index, layout.completion_index])
        return torch.empty_like(both).index_copy(0, places, both)  # (T, H)

    def embed_prompts(self, encoded: Sequence[EncodedPrompt]) -> Tensor:
        """(sum of prompt lengths, H), prompts end to end, image features in their places; one vision pass for all.

        The features of a vision tower that is not trained, or rests, are remembered: the image is not looked at again.
        """
        token_ids = bring(torch.cat([prompt.token_ids for prompt in encoded]), self.device)
        pixels = [prompt.pixels for prompt in encoded if prompt.pixels is not None]
        grids = [prompt.grids for prompt in encoded if prompt.pixels is not None]
        with phase("vision"):
            if not pixels:
                features = None
            elif self.family.vision_frozen or self._weights_rest:
                features = self._features.of(self.family, pixels, grids)
            else:
                features = self.family.image_features(together(pixels, self.device), torch.cat(grids))
        return self.family.embed_prompts(token_ids, features)

    @contextmanager
    def looking_once(self) -> Iterator[None]:
        """Within, nothing is trained: what an image looks like is remembered for as long as its prompt is held."""
        before, self._weights_rest = self._weights_rest, True
        try:
            with torch.no_grad():
                yield
        finally:
            self._weights_rest = before

    def restore(self, folder: Path) -> None:
        """Take the weights of a checkpoint of this model."""
        if has_lora(self.model):
            load_lora(self.model, folder / lora.FOLDER)
        else:
            saved = type(self.model).from_pretrained(folder, dtype=self.family.head.dtype, use_safetensors=True)
            self.model.load_state_dict(saved.state_dict())

    @contextmanager
    def using_attention(self, implementation: str) -> Iterator[None]:
        """Run the language model on another of transformers' attention implementations for a while."""
        config = self.model.config.text_config
        before = config._attn_implementation
        config._attn_implementation = implementation
        try:
            yield
        finally:
            config._attn_implementation = before


def load_policy(settings: PolicySettings) -> Policy:
    """The policy a recipe asks for, to be trained."""
    check_trainable(settings.dtype)
    policy = Policy.load(
        settings.model,
        dtype=settings.dtype,
        min_pixels=settings.min_pixels,
        max_pixels=settings.max_pixels,
        attention=settings.attention,
    )
    policy.freeze_reference(settings.model)
    if settings.freeze_vision:
        policy.family.vision.requires_grad_(False)
    if settings.lora is not None:
        policy.add_lora(settings.lora)
    if settings.checkpoint_activations:
        policy.checkpoint_activations()
    policy.kernels = settings.kernels
    policy.compile_layers(settings.compile_layers)
    return policy
