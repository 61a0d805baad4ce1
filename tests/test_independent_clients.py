"""OpenAI's own client, unmodified, through the router."""

from collections.abc import Iterator
from typing import Any

import pytest
from mock_cluster import RunningRouter, mock_cluster
from mock_engine import text_of

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("clients")
    with mock_cluster(folder, "PD", policy="never", api_keys=["right"], limits={"body_bytes": 10_000}) as (router, _):
        yield router


def connect(router: RunningRouter, key: str = "right") -> Any:
    return openai.OpenAI(base_url=router.url + "/v1", api_key=key, max_retries=0, timeout=20)


def test_completions_streamed_and_whole(client: RunningRouter) -> None:
    with connect(client) as ours:
        whole = ours.completions.create(model="mock", prompt=[1, 2, 3], max_tokens=4)
        assert whole.choices[0].text == text_of([1, 2, 3], 4)
        assert whole.usage.prompt_tokens == 3
        streamed = ours.completions.create(model="mock", prompt=[1, 2, 4], max_tokens=4, stream=True)
        assert "".join(event.choices[0].text for event in streamed) == text_of([1, 2, 4], 4)
        raw = ours.completions.with_raw_response.create(model="mock", prompt=[1], max_tokens=1)
        assert raw.headers["x-deflector-path"] == "disaggregate"


def test_models_are_listed(client: RunningRouter) -> None:
    with connect(client) as ours:
        assert [model.id for model in ours.models.list()] == ["mock"]


def test_errors_are_those_that_the_client_knows(client: RunningRouter) -> None:
    with connect(client, key="wrong") as stranger, pytest.raises(openai.AuthenticationError, match="API key"):
        stranger.completions.create(model="mock", prompt=[1], max_tokens=1)
    with connect(client) as ours:
        with pytest.raises(openai.BadRequestError, match="prompt"):
            ours.completions.create(model="mock", prompt=[], max_tokens=1)
        with pytest.raises(openai.APIStatusError, match="longer than") as error:
            ours.completions.create(model="mock", prompt=list(range(10_000)), max_tokens=1)
        assert error.value.status_code == 413
        with pytest.raises(openai.NotFoundError):
            ours.embeddings.create(model="mock", input="x")
