"""What docs/clients.md needs: a tokenizer folder that no network is needed for, and a router before mock engines.

python scripts/mock_clients.py --tokenizer my-tokenizer      (needs tokenizers and transformers, as guidellm has them)
python scripts/mock_clients.py --port 8000                   (until Ctrl-C)
"""

import argparse
import contextlib
import signal
import sys
import tempfile
from pathlib import Path


def write_tokenizer(folder: str) -> None:
    """A tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted({*map(chr, range(32, 127)), *pre_tokenizers.ByteLevel.alphabet()})
    vocabulary = {letter: number for number, letter in enumerate([*alphabet, "<unk>"])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<unk>").save_pretrained(folder)


def main() -> None:
    """Does what the flags say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", metavar="DIR", help="write the tokenizer here, and end")
    parser.add_argument("--port", type=int, default=8000, help="of the router (default: 8000)")
    flags = parser.parse_args()
    if flags.tokenizer:
        write_tokenizer(flags.tokenizer)
        return
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from mock_cluster import mock_cluster

    with tempfile.TemporaryDirectory() as folder, mock_cluster(Path(folder), port=flags.port) as (router, _):
        print(f"{router.url}: kairos before two prefill and two decode mocks; Ctrl-C ends it", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
        print(f"{router.metric('deflector_requests_total'):.0f} requests served")


if __name__ == "__main__":
    main()
