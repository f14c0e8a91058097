"""A model is asked with the tokenizer of its training data, or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from export_cases import write_run
from model_cases import assert_refused, edit, opened

from data_io.byte_tokenizer import byte_tokenizer
from data_io.special_tokens import BOQ, CONDITION_TOKENS, EOA, EOQ


def other_tokenizer(folder: Path, *, added: int = 0, swapped: bool = False) -> Path:
    folder.mkdir()
    tokenizer = byte_tokenizer()
    if added:
        tokenizer.add_tokens([f"word{number}" for number in range(added)])
    text = json.loads(tokenizer.to_str())
    if swapped:
        vocab = text["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "tokenizer.json").write_text(json.dumps(text))
    return folder


def test_the_run_keeps_its_tokenizer_and_an_other_place_overrides_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert opened(run).prompt_format.eoa == EOA
    shutil.copytree(run, elsewhere := tmp_path / "moved")
    (run / "tokenizer.json").unlink()
    assert_refused(run, "the tokenizer of .*run is gone .*tokenizer.json.*give tokenizer_path")
    assert opened(run, tokenizer_path=elsewhere).prompt_format.eoa == EOA
    assert opened(run, tokenizer_path=elsewhere / "tokenizer.json").prompt_format.eoa == EOA
    assert_refused(
        run, "tokenizer_path=.*nowhere: there is no", tokenizer_path=tmp_path / "nowhere"
    )


def test_a_tokenizer_with_other_ids_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    swapped = other_tokenizer(tmp_path / "swapped", swapped=True)
    assert_refused(run, "have other ids: id .* is 'b' in the one and 'a'", tokenizer_path=swapped)
    larger = other_tokenizer(tmp_path / "larger", added=300)
    assert_refused(run, "have other ids: id 287 is 'word0' in .* None", tokenizer_path=larger)
    (run / "tokenizer.json").unlink()  # nothing left to compare with but the model's size
    assert_refused(
        run, "its 587 ids make a vocabulary of 768, the model's is 512", tokenizer_path=larger
    )
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    assert_refused(run, "broken.json is not the tokenizer of", tokenizer_path=broken)


def test_a_tokenizer_without_the_tokens_that_frame_prompts_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    info = {"tokenizer_path": str(run), "boq": BOQ, "eoq": EOQ, "eoa": "<|end|>"}
    info |= {"condition_mapping": dict(CONDITION_TOKENS)}
    edit(run / "train_metadata.yaml", lambda content: content.update(tokenizer_info=info))
    assert_refused(run, "not special tokens of the tokenizer: {'eoa': '<|end|>'}")
    edit(run / "train_metadata.yaml", lambda content: content.update(tokenizer_info={}))
    assert_refused(run, "tokenizer_info lacks boq, eoq, eoa, condition_mapping")


def test_the_data_folder_that_a_run_names_is_not_looked_into(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "tokenizer.json").unlink()
    beside = other_tokenizer(tmp_path / "data", swapped=True)
    edit(run / "all_config.yaml", lambda content: content.update(data={"path": str(beside)}))
    gone = str(tmp_path / "gone")
    edit(
        run / "train_metadata.yaml",
        lambda content: content["tokenizer_info"].update(tokenizer_path=gone),
    )
    assert_refused(run, "the tokenizer of .* is gone")
