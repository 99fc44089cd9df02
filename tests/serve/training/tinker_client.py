"""What a program of the `tinker` SDK does, run by a Python that has it and not veneer: every public
method that concerns text, against the server at argv[1]. It prints a line of JSON: what
test_tinker.py compares."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
import urllib.request
import warnings

os.environ["TINKER_TELEMETRY"] = "0"
warnings.simplefilter("ignore")

import tinker  # noqa: E402  # pyright: ignore[reportMissingImports]
import torch  # noqa: E402
from tinker import types  # noqa: E402  # pyright: ignore[reportMissingImports]

URL, KEY = sys.argv[1], sys.argv[2]
DATA = [[40, 51, 62, 73, 84, 95], [106, 117, 128, 139], [150, 161, 172, 183, 194, 205, 216, 227]]
PROMPT = types.ModelInput.from_ints(DATA[0])
#: public methods that do not concern text, and why
NOT_TEXT = {
    "get_telemetry": "what the SDK tells its makers of itself, which is off",
    "on_queue_state_change": "the SDK calls it itself, when an answer is late",
}


class Watched:
    """A client whose public methods are noted as they are called; by this program, not by the
    client itself."""

    called: set[tuple[str, str]] = set()

    def __init__(self, client):
        self._client = client

    def __getattr__(self, name):
        self.called.add((type(self._client).__name__, name))
        return getattr(self._client, name)


def uncalled():
    """The public methods of the installed clients that this program did not call and has no reason
    not to."""
    found = []
    for client in (
        tinker.ServiceClient,
        tinker.TrainingClient,
        tinker.SamplingClient,
        tinker.RestClient,
    ):
        for name, _ in inspect.getmembers(client, callable):
            if (
                not name.startswith("_")
                and name not in NOT_TEXT
                and (client.__name__, name) not in Watched.called
            ):
                found.append(f"{client.__name__}.{name}")
    return found


def datum(tokens, **inputs):
    targets = {"target_tokens": tokens[1:], **inputs}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=targets)


def supervised():
    return [datum(tokens, weights=[1.0] * (len(tokens) - 1)) for tokens in DATA]


def refused(work):
    """The words of the client's own error."""
    try:
        work()
    except (
        tinker.APIStatusError,
        tinker.RequestFailedError,
        RuntimeError,
        tinker.TinkerError,
    ) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("it was not refused")


def training(service, found):
    client = Watched(
        service.create_lora_training_client(
            "tiny", rank=4, seed=1, user_metadata={"who": "test"}
        ).result()
    )
    found["run"], found["losses"] = client.model_id, []
    for _ in range(4):
        passed, step = (
            client.forward_backward(supervised(), "cross_entropy"),
            client.optim_step(types.AdamParams(learning_rate=0.02)),
        )
        found["losses"].append(passed.result().metrics["loss:sum"])
        step.result()
    found["logprobs"] = (
        client.forward(supervised(), "cross_entropy")
        .result()
        .loss_fn_outputs[0]["logprobs"]
        .tolist()
    )
    policy = [
        datum(tokens, logprobs=[-5.0] * (len(tokens) - 1), advantages=[0.5] * (len(tokens) - 1))
        for tokens in DATA
    ]
    for loss, settings in (
        ("importance_sampling", None),
        ("ppo", {"clip_low_threshold": 0.9}),
        ("cispo", None),
        ("dro", {"beta": 0.1}),
    ):
        assert client.forward_backward(policy, loss, settings).result().metrics[
            "loss:sum"
        ] < 0 or loss in (
            "cispo",
            "dro",
        )

    for one in policy:
        one.loss_fn_inputs["sequence_ratio_mask"] = types.TensorData.from_torch(
            torch.ones(one.model_input.length)
        )
    assert client.forward_backward(policy, "gspo").result().metrics["loss:sum"] < 0

    def custom(data, logprobs):
        loss = torch.stack([own.exp().sum() for own in logprobs]).sum()
        return loss, {"own": float(loss.detach())}

    found["custom"] = client.forward_backward_custom(supervised(), custom).result().metrics["own"]
    handle = service.create_custom_loss(per_datum, {"logprobs": 1, "weights": 1}).result()
    found["handle"] = (
        client.forward_backward_custom(supervised(), handle).result().metrics["loss:sum"]
    )
    wide = torch.zeros(5, 3, dtype=torch.int64)
    wide[:, 0], weights = torch.tensor(DATA[0][1:]), torch.zeros(5, 3)
    weights[:, 0] = 1.0
    several = types.Datum(
        model_input=types.ModelInput.from_ints(DATA[0][:-1]),
        loss_fn_inputs={"target_tokens": wide, "weights": weights},
    )
    found["several"] = client.forward([several], "cross_entropy").result().metrics["loss:sum"]
    found["info"] = client.get_info().model_dump(mode="json")
    found["bad"] = refused(
        lambda: client.forward_backward([datum([1, 999])], "cross_entropy").result()
    )
    found["unknown"] = refused(lambda: client.forward(supervised(), "stable_reinforce").result())
    assert client.get_tokenizer().encode("a")
    assert client.get_console_url()
    return client


def per_datum(logprobs, weights):
    loss = -(logprobs * weights).sum()
    return loss, {"custom/nll:sum": loss}


def checkpoints(service, client, found):
    state = client.save_state("state", user_metadata={"x": "y"}).result().path
    sampler = client.save_weights_for_sampler("sampler").result().path
    external = client.save_weights_external("external").result().path
    found["taken"] = refused(
        lambda: service.create_training_client_from_state(state).result().save_state("a/b").result()
    )
    for create in (
        service.create_training_client_from_state,
        service.create_training_client_from_state_with_optimizer,
    ):
        other = Watched(create(state).result())
        found.setdefault("resumed", []).append(
            other.forward(supervised(), "cross_entropy").result().metrics["loss:sum"]
        )
    found["now"] = client.forward(supervised(), "cross_entropy").result().metrics["loss:sum"]
    other.load_state(state).result()
    other.load_state_with_optimizer(state).result()
    return state, sampler, external


def sampling(service, client, sampler, found):
    params = types.SamplingParams(max_tokens=8, temperature=0.0, stop=[])
    own = Watched(client.save_weights_and_get_sampling_client().result())
    inflight = client.save_weights_and_get_sampling_client(kind="inflight").result()
    named, base = (
        service.create_sampling_client(model_path=sampler).result(),
        service.create_sampling_client(base_model="tiny").result(),
    )
    also = client.create_sampling_client(sampler).result()
    found["samples"] = [
        one.sample(PROMPT, 1, params).result().sequences[0].tokens
        for one in (own, inflight, named, also)
    ]
    found["base"] = base.sample(PROMPT, 1, params).result().sequences[0].tokens
    whole = DATA[0] + found["samples"][0]
    answer = own.sample(
        PROMPT,
        2,
        types.SamplingParams(max_tokens=4, seed=3, top_k=5, top_p=0.9, stop=["zz"]),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=2,
        topk_sample_logprobs=3,
        prompt_alt_tokens_k=2,
        prompt_logprobs_last_n=2,
        target_prompt_logprobs=types.TensorData(data=[5] * 5, dtype="int64", shape=[5, 1]),
    ).result()
    assert len(answer.sequences) == 2
    assert answer.prompt_alt_tokens.tokens.shape == [5, 2]
    assert answer.target_prompt_logprobs.shape == [5, 1]
    assert answer.prompt_logprobs[:4] == [None] * 4
    assert len(answer.topk_prompt_logprobs[-1]) == 2
    assert len(answer.sequences[0].topk_logprobs[0]) == 3
    found["scored"] = own.compute_logprobs(types.ModelInput.from_ints(whole)).result()
    found["trained"] = (
        client.forward([datum(whole)], "cross_entropy")
        .result()
        .loss_fn_outputs[0]["logprobs"]
        .tolist()
    )
    found["drawn"] = own.sample(PROMPT, 1, params).result().sequences[0].logprobs
    assert own.get_tokenizer().encode("a")
    clone = own.from_sampler_handle(own.get_sampler_handle(), api_key=KEY)
    assert clone.sample(PROMPT, 1, params).result().sequences[0].tokens == found["samples"][0]
    assert own.get_base_model() == "tiny"
    found["long"] = refused(
        lambda: own.sample(types.ModelInput.from_ints([5] * 500), 1, params).result()
    )
    return own


def rest(service, client, paths, sampler, found):
    state, _, external = paths
    client_ = Watched(tinker.RestClient(base_url=URL, api_key=KEY))
    found["models"] = [
        one.model_name for one in client_.get_server_capabilities().result().supported_models
    ]
    run = client_.get_training_run(client.model_id).result()
    assert run.lora_rank == 4
    assert run.user_metadata == {"who": "test"}
    assert (
        client_.get_training_run_by_tinker_path(state).result().training_run_id == client.model_id
    )
    assert client_.get_weights_info_by_tinker_path(state).result().lora_rank == 4
    assert client.model_id in [
        one.training_run_id for one in client_.list_training_runs(limit=100).result().training_runs
    ]
    assert {
        one.tinker_path for one in client_.list_checkpoints(client.model_id).result().checkpoints
    } == set(paths)
    assert set(paths) <= {
        one.tinker_path for one in client_.list_user_checkpoints().result().checkpoints
    }
    urls = client_.get_external_weights_urls(external).result().urls
    found["files"] = {name: len(urllib.request.urlopen(url).read()) for name, url in urls.items()}
    found["urls"] = urls
    copied = client_.copy_weights(state, "any").result()
    assert client_.get_weights_info_by_tinker_path(copied).result().is_lora
    os.environ["TINKER_PROJECT_ID"] = "any"  # without which the client copies nothing
    assert service.copy_weights(state).result()
    client_.publish_checkpoint_from_tinker_path(state).result()
    client_.unpublish_checkpoint_from_tinker_path(state).result()
    client_.set_checkpoint_ttl_from_tinker_path(state, 7200).result()
    client_.delete_checkpoint_from_tinker_path(copied).result()
    client_.delete_checkpoint(client.model_id, "weights/state").result()
    session = client.model_id.split(":")[0]
    assert client.model_id in client_.get_session(session).result().training_run_ids
    assert session in client_.list_sessions(limit=100).result().sessions
    assert session in [
        one.session_id
        for one in client_.search_sessions(types.SessionSearchRequest(session_id=session))
        .result()
        .sessions
    ]
    assert client_.get_sampler(sampler._sampling_session_id).result().base_model == "tiny"
    for work in (
        lambda: client_.assign_session_project(session, "p").result(),
        lambda: client_.export_session_trace(session).result(),
        lambda: client_.get_audit_log().result(),
        lambda: client_.get_billing_usage("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z").result(),
        lambda: client_.get_current_checkpoint_storage_usage().result(),
    ):
        found.setdefault("hosted", []).append(refused(work))
    found["whoami"] = refused(lambda: client_.whoami().result())
    return client_


async def refused_async(work):
    try:
        await work
    except (
        tinker.APIStatusError,
        tinker.RequestFailedError,
        RuntimeError,
        tinker.TinkerError,
    ) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("it was not refused")


async def training_async(service, found):
    """The deprecated methods that are coroutines: a run that goes as the other one did."""
    assert (await service.get_server_capabilities_async()).supported_models
    client = Watched(await service.create_lora_training_client_async("tiny", rank=4, seed=1))
    found["losses_async"] = []
    for _ in range(2):
        passed = await client.forward_backward_async(supervised(), "cross_entropy")
        stepped = await client.optim_step_async(types.AdamParams(learning_rate=0.02))
        found["losses_async"].append((await passed).metrics["loss:sum"])
        await stepped
    forward = (await (await client.forward_async(supervised(), "cross_entropy"))).metrics[
        "loss:sum"
    ]
    await (
        await client.forward_backward_custom_async(
            supervised(), lambda data, own: (torch.cat(own).sum(), {})
        )
    )
    assert (await client.get_info_async()).model_data.model_name == "tiny"
    state = (await (await client.save_state_async("state"))).path
    for create in (
        service.create_training_client_from_state_async,
        service.create_training_client_from_state_with_optimizer_async,
    ):
        other = Watched(await create(state))
        found.setdefault("resumed_async", []).append(
            (await (await other.forward_async(supervised(), "cross_entropy"))).metrics["loss:sum"]
            / forward
        )
    await (await other.load_state_async(state))
    await (await other.load_state_with_optimizer_async(state))
    return client, state


async def sampling_async(service, client):
    params = types.SamplingParams(max_tokens=4, temperature=0.0, stop=[])
    path = (await (await client.save_weights_for_sampler_async("sampler"))).path
    own = Watched(await client.save_weights_and_get_sampling_client_async())
    (expected,) = (await own.sample_async(PROMPT, 1, params)).sequences
    for other in (
        await client.create_sampling_client_async(path),
        await service.create_sampling_client_async(model_path=path),
        await own.create(service.holder, model_path=path),
    ):
        assert (await other.sample(PROMPT, 1, params)).sequences[0].tokens == expected.tokens
    scored = await own.compute_logprobs_async(types.ModelInput.from_ints(DATA[0] + expected.tokens))
    assert (
        max(abs(one - other) for one, other in zip(scored[6:], expected.logprobs, strict=True))
        < 1e-4
    )
    assert await own.get_base_model_async() == "tiny"
    return own


async def rest_async(client_, client, state, sampler, found):
    run, session = client.model_id, client.model_id.split(":")[0]
    assert (await client_.get_training_run_async(run)).lora_rank == 4
    assert (await client_.get_training_run_by_tinker_path_async(state)).training_run_id == run
    assert run in [
        one.training_run_id
        for one in (await client_.list_training_runs_async(limit=100)).training_runs
    ]
    external = (await (await client.save_weights_external_async("external"))).path
    assert state in [
        one.tinker_path for one in (await client_.list_checkpoints_async(run)).checkpoints
    ]
    assert state in [
        one.tinker_path for one in (await client_.list_user_checkpoints_async()).checkpoints
    ]
    assert (await client_.get_external_weights_urls_async(external)).urls
    copied = await client_.copy_weights_async(state, "any")
    await client_.publish_checkpoint_from_tinker_path_async(state)
    await client_.unpublish_checkpoint_from_tinker_path_async(state)
    await client_.set_checkpoint_ttl_from_tinker_path_async(state, 7200)
    await client_.delete_checkpoint_from_tinker_path_async(copied)
    await client_.delete_checkpoint_async(run, "weights/state")
    assert run in (await client_.get_session_async(session)).training_run_ids
    assert session in (await client_.list_sessions_async(limit=100)).sessions
    assert (await client_.get_sampler_async(sampler._sampling_session_id)).base_model == "tiny"
    for work in (
        client_.assign_session_project_async(session, "p"),
        client_.export_session_trace_async(session),
        client_.get_audit_log_async(),
        client_.get_billing_usage_async("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"),
        client_.get_current_checkpoint_storage_usage_async(),
    ):
        found["hosted"].append(await refused_async(work))


async def asynchronous(service, client_, found):
    client, state = await training_async(service, found)
    sampler = await sampling_async(service, client)
    await rest_async(client_, client, state, sampler, found)


def main():
    found = {}
    service = Watched(tinker.ServiceClient(base_url=URL, api_key=KEY))
    assert service.get_server_capabilities().supported_models
    assert service.create_rest_client().get_server_capabilities().result().supported_models
    client = training(service, found)
    paths = checkpoints(service, client, found)
    sampler = sampling(service, client, paths[1], found)
    client_ = rest(service, client, paths, sampler, found)
    asyncio.run(asynchronous(service, client_, found))
    assert service.get_console_url()
    service.close("success").result()
    print(json.dumps({**found, "uncalled": uncalled()}))


main()
