import itertools
import json

import numpy as np
import pytest
import torch

import audio
from conftest import call, shared
from tokenize_audio import AudioTokenizer, collapse, edit_distance, kmeans, nearest, steady


def test_collapse_keeps_one_of_each_run_and_its_length():
    units, durations = collapse([7, 7, 7, 2, 2, 7])
    assert units.tolist() == [7, 2, 7] and durations.tolist() == [3, 2, 1] and units.dtype == np.uint16
    assert [len(x) for x in collapse([])] == [0, 0]


def test_edit_distance_by_hand():
    assert [edit_distance(a, b) for a, b in (("kitten", "sitting"), ("", "abc"), ("abc", "abc"), ("ab", "ba"))] == [3, 3, 0, 2]


def test_nearest_is_the_least_euclidean_distance():
    x, c = torch.randn(50, 6), torch.randn(9, 6)
    assert torch.equal(nearest(x, c), torch.cdist(x, c).argmin(1))


@pytest.mark.parametrize("switch", [0.0, 0.5, 3.0, 1e6])
def test_steady_units_are_the_cheapest_path_of_all(switch):
    generator = torch.Generator().manual_seed(0)
    x, c = torch.randn(6, 2, generator=generator), torch.randn(3, 2, generator=generator)
    d = torch.cdist(x.double(), c.double()) ** 2
    price = lambda path: sum(d[t, u].item() for t, u in enumerate(path)) + switch * sum(a != b for a, b in zip(path, path[1:]))
    best = min(itertools.product(range(3), repeat=6), key=price)
    assert tuple(steady(x, c, switch)) == best
    assert len(steady(x[:0], c, switch)) == 0
    assert switch < 1e6 or len(set(best)) == 1, "what costs too much never changes"



def test_kmeans_finds_separate_clouds_and_repeats_by_seed():
    torch.manual_seed(0)
    middles = 10 * torch.randn(8, 5)
    x = (middles[:, None] + 0.1 * torch.randn(8, 40, 5)).reshape(-1, 5)
    found = kmeans(x, 8, seed=3)
    assert torch.cdist(middles, found).min(1).values.max() < 0.2
    assert torch.equal(found, kmeans(x, 8, seed=3))
    with pytest.raises(ValueError, match="too few"):
        kmeans(x[:5], 8)


def test_our_quantiser_agrees_with_float64_on_real_hubert_features():
    x = torch.from_numpy(np.load(shared("hubert_golden/sample.base.L9.npy"))).reshape(-1, 768).float()
    centroids = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:100]]
    assert len(x) == 596 and torch.equal(nearest(x, centroids), torch.cdist(x.double(), centroids.double()).argmin(1))


def test_real_speech_gives_as_many_frames_as_the_stored_features():
    samples = audio.load(shared("hubert_golden/6313-76958-0021.flac"))
    assert len(samples) == 190800 and len(audio.mfcc(samples)) == 596


@pytest.fixture
def folder(speedrun):
    return speedrun / "units"


def test_a_units_folder_is_what_the_design_says(folder, speedrun):
    corpus = audio.Units(folder)
    heard = sum(len(audio.load(row["audio"])) // 320 for row in corpus.rows)
    assert int(corpus.durations.sum()) == heard and corpus.units.max() < corpus.meta["k"] == 20
    assert (folder / "units.bin").stat().st_size == 2 * corpus.offsets[-1] and (folder / "recipe.json").exists()
    assert [row["text"] for row in corpus.rows] == [row["text"] for row in audio.read_manifest(speedrun / "toy/speech/train.jsonl")]


def test_every_folder_that_hears_gives_the_same_units(speedrun):
    samples = audio.load(speedrun / "question.wav")
    said = [AudioTokenizer(speedrun / name)(samples)[0].tolist() for name in ("codebook", "units", "speech", "merged")]
    assert said[0] and all(units == said[0] for units in said)


def test_a_codebook_or_hubert_that_was_changed_is_refused(speedrun, tmp_path):
    import shutil
    for name in ("codebook.safetensors", "hubert/config.json"):
        folder = tmp_path / name.replace("/", "_")
        shutil.copytree(speedrun / "codebook", folder)
        (folder / name).write_bytes((folder / name).read_bytes() + b" ")
        with pytest.raises(ValueError, match="sha256 differs"):
            AudioTokenizer(folder)


def test_a_clip_shorter_than_a_frame_and_a_bad_layer_are_refused(speedrun, tmp_path, monkeypatch):
    import soundfile
    soundfile.write(tmp_path / "short.wav", np.zeros(100, np.float32), 16000)
    (tmp_path / "m.jsonl").write_text(json.dumps({"audio": "short.wav"}) + "\n")
    with pytest.raises(ValueError, match="under one frame"):
        call(["tokenize_audio.py", "encode", "--manifest", str(tmp_path / "m.jsonl"), "--codebook", str(speedrun / "codebook"), "--out", str(tmp_path / "u")], monkeypatch)
    assert not (tmp_path / "u").exists()
    with pytest.raises(ValueError, match="layers 0 to 5"):
        call(["tokenize_audio.py", "fit", "--manifest", str(tmp_path / "m.jsonl"), "--hubert", str(speedrun / "hubert"), "--layer", "9", "--out", str(tmp_path / "c")], monkeypatch)
