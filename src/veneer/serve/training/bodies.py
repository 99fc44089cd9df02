"""The JSON bodies of the `tinker` SDK (tinker/types, 0.38) as this server takes them.

Unknown fields are refused by name, so that no request of a client is silently ignored. Harmless
fields without a meaning here (tags, a version) are accepted.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    model_validator,
)
from pydantic.fields import FieldInfo

from veneer.serve.body_rules import few_unknown
from veneer.serve.refusal import value_error
from veneer.serve.training.run_trainer import Adam

Id = Annotated[str, Field(max_length=256)]
Path = Annotated[str, Field(max_length=512)]
Seq = Annotated[int, Field(ge=0, lt=2**31)]
Metadata = Annotated[dict[str, Any], Field(max_length=64)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
#: how long a checkpoint is kept: an hour to ten years
Stay = Annotated[int, Field(ge=3600, le=10 * 366 * 86400)]


def _few_entries(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > 64:
        raise value_error(f"{len(value):,} entries", "at most 64", "leave some out")
    return value


def _aliases(info: FieldInfo) -> list[str]:
    return [str(name) for name in getattr(info.validation_alias, "choices", ())]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _few(cls, data: Any) -> Any:
        field_names = {
            name for field, info in cls.model_fields.items() for name in (field, *_aliases(info))
        }
        return few_unknown(data, field_names) if isinstance(data, dict) else data


class Typed(Body):
    type: str | None = None


class ClientConfig(Body):
    sdk_version: Annotated[str, Field(max_length=64)]


class CreateSession(Typed):
    tags: Annotated[list[str], Field(fail_fast=True, max_length=64)] = []
    user_metadata: Metadata | None = None
    sdk_version: Annotated[str, Field(max_length=64)] = ""
    project_id: Id | None = None
    display_name: Id | None = None


class OfSession(Typed):
    session_id: Id


class FinishReason(Body):
    type: Literal["success", "errored", "interrupted"]


class Finish(Body):
    reason: FinishReason
    detail: Annotated[str, Field(max_length=4096)] | None = None


class Lora(Body):
    rank: Annotated[int, Field(ge=1, le=4096)]
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class OptimizerFamily(BaseModel):
    model_config = ConfigDict(extra="allow")
    type: Annotated[str, Field(max_length=64)]


class CreateModel(Typed):
    session_id: Id
    model_seq_id: Seq
    base_model: Path
    user_metadata: Metadata | None = None
    lora_config: Lora | None = None
    optimizer_config: OptimizerFamily | None = None


class OfModel(Typed):
    model_id: Id


class AdamParams(Body):
    learning_rate: FiniteFloat = Adam.rate
    beta1: FiniteFloat = Adam.beta1
    beta2: FiniteFloat = Adam.beta2
    eps: FiniteFloat = Adam.eps
    weight_decay: FiniteFloat = Adam.decay
    grad_clip_norm: FiniteFloat = Adam.clip


class OptimStep(OfModel):
    adam_params: AdamParams | None = Field(
        None, validation_alias=AliasChoices("adam_params", "optim_params")
    )
    optimizer_params: OptimizerFamily | None = None
    seq_id: Seq | None = None


class Save(OfModel):
    path: Annotated[str, Field(max_length=256)] | None = None
    seq_id: Seq | None = None
    ttl_seconds: Stay | None = None
    overwrite: bool = False
    user_metadata: Metadata | None = None


class SaveForSampler(OfModel):
    path: Annotated[str, Field(max_length=256)] | None = None
    sampling_session_seq_id: Seq | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    seq_id: Seq | None = None
    ttl_seconds: Stay | None = None
    user_metadata: Metadata | None = None


class SaveExternal(OfModel):
    path: Annotated[str, Field(max_length=256)]
    seq_id: Seq | None = None
    ttl_seconds: Stay | None = None
    age_encryption_recipients: Annotated[list[str], Field(fail_fast=True, max_length=10)] | None = (
        None
    )


class Load(Typed):
    model_id: Id | None = None
    seq_id: Seq | None = None
    session_id: Id | None = None
    model_seq_id: Seq | None = None
    base_model: Path | None = None
    user_metadata: Metadata | None = None
    path: Path
    optimizer: bool
    optimizer_config: OptimizerFamily | None = None
    weights_access_token: Annotated[str, Field(max_length=4096)] | None = None


class CreateSampler(OfSession):
    sampling_session_seq_id: Seq
    base_model: Path | None = None
    model_path: Path | None = None


class JoinSampler(Typed):
    sampling_session_id: Id


class Chunk(Body):
    type: Literal["encoded_text"] = "encoded_text"
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


class ModelInput(Body):
    chunks: Annotated[list[Chunk], Field(fail_fast=True, max_length=65536)]

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(token for chunk in self.chunks for token in chunk.tokens)


class SamplingParams(Body):
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[str, Field(max_length=256)]
        | Annotated[list[TokenId], Field(fail_fast=True, max_length=256)]
        | Annotated[
            list[Annotated[str, Field(min_length=1, max_length=256)]],
            Field(fail_fast=True, max_length=64),
        ]
        | None
    ) = None
    temperature: Annotated[FiniteFloat, Field(ge=0, le=100)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = -1
    top_p: Annotated[FiniteFloat, Field(gt=0, le=1)] = 1.0


class Targets(Body):
    """Token ids [len(prompt) - 1, k], dense or in CSR; -1 requests no log-probability."""

    data: Annotated[list[Annotated[int, Field(ge=-1, lt=2**31)]], Field(fail_fast=True)]
    dtype: Literal["int64"]
    shape: Annotated[
        list[Annotated[int, Field(ge=0, lt=2**31)]],
        Field(fail_fast=True, min_length=2, max_length=2),
    ]
    sparse_crow_indices: Annotated[list[int], Field(fail_fast=True)] | None = None
    sparse_col_indices: Annotated[list[int], Field(fail_fast=True)] | None = None


class Sample(Typed):
    num_samples: Annotated[int, Field(ge=1, le=128)] = 1
    prompt: ModelInput
    sampling_params: SamplingParams
    base_model: Path | None = None
    model_path: Path | None = None
    sampling_session_id: Id | None = None
    seq_id: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: Annotated[int, Field(ge=0, le=256)] = 0
    topk_sample_logprobs: Annotated[int, Field(ge=0, le=256)] = 0
    target_prompt_logprobs: Targets | None = None
    prompt_alt_tokens_k: Annotated[int, Field(ge=0, le=256)] = 0
    prompt_logprobs_last_n: Annotated[int, Field(ge=1)] | None = None
    record_stability_info: bool | None = None


class Retrieve(Body):
    request_id: Id
    allow_metadata_only: bool = False


class Cancel(Body):
    request_id: Id


class OfPath(Body):
    tinker_path: Path


class Ttl(Body):
    ttl_seconds: Stay | None = None


class CopyWeights(Body):
    session_id: Id | None = None
    model_seq_id: Seq | None = None
    destination_project_id: Id | None = None
    source_path: Path
    ttl_seconds: Stay | None = None
    weights_access_token: Annotated[str, Field(max_length=4096)] | None = None


class SearchSessions(Body):
    session_id: Id | None = None
    project_ids: Annotated[list[Id], Field(fail_fast=True, max_length=64)] | None = None
    user_metadata: Annotated[dict[str, str], BeforeValidator(_few_entries)] = {}
    display_name: Id | None = None
    owner: dict[str, Any] = {"type": "own"}
    statuses: Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=8)] | None = None
    limit: Annotated[int, Field(ge=1, le=200)] = 50
    cursor: dict[str, Any] | None = None
