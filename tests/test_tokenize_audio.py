import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import audio
import runs
import tokenize_audio
from conftest import ROOT, call, shared
from evaluate import edit_distance
from tokenize_audio import AudioTokenizer, collapse, kmeans, nearest, steady


def test_collapse_keeps_one_of_each_run_and_its_length():
    units, durations = collapse([7, 7, 7, 2, 2, 7])
    assert units.tolist() == [7, 2, 7]
    assert durations.tolist() == [3, 2, 1]
    assert units.dtype == np.uint16
    assert [len(x) for x in collapse([])] == [0, 0]


def test_runs_longer_than_a_duration_can_hold_become_several():
    units, durations = collapse([3] * 150_000 + [1])
    assert units.tolist() == [3, 3, 3, 1] and durations.tolist() == [65535, 65535, 18930, 1]


def test_edit_distance_by_hand():
    assert [
        edit_distance(a, b)
        for a, b in (("kitten", "sitting"), ("", "abc"), ("abc", "abc"), ("ab", "ba"))
    ] == [3, 3, 0, 2]


def test_nearest_is_the_least_euclidean_distance():
    x, c = torch.randn(50, 6), torch.randn(9, 6)
    assert torch.equal(nearest(x, c), torch.cdist(x, c).argmin(1))


@pytest.mark.parametrize("switch", [0.0, 0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 1e6])
def test_steady_units_are_the_cheapest_path_of_all(switch):
    generator = torch.Generator().manual_seed(0)
    x, c = torch.randn(6, 2, generator=generator), torch.randn(3, 2, generator=generator)
    d = torch.cdist(x.double(), c.double()) ** 2
    price = lambda path: sum(d[t, u].item() for t, u in enumerate(path)) + switch * sum(
        a != b for a, b in zip(path, path[1:])
    )
    best = min(itertools.product(range(3), repeat=6), key=price)
    assert tuple(steady([x], c, switch)[0]) == best
    assert len(steady([x[:0]], c, switch)[0]) == 0
    among = steady([x[:0], torch.randn(9, 2, generator=generator), x, x[:4]], c, switch)
    assert [len(path) for path in among] == [0, 9, 6, 4]
    assert tuple(among[2]) == best, "a clip's path is its own in any company"
    assert np.array_equal(among[3], steady([x[:4]], c, switch)[0])
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


def test_minibatches_reach_what_whole_passes_reach_and_repeat_by_seed():
    torch.manual_seed(0)
    # One cloud: no start is luckier than another.
    x = torch.randn(6000, 8)
    inertia = lambda c: (x - c[nearest(x, c)]).pow(2).sum(1).mean().item()
    quick, full = kmeans(x, 40, seed=1, minibatch=512), kmeans(x, 40, seed=1, passes=300)
    assert inertia(quick) < 1.02 * inertia(full)
    assert torch.equal(quick, kmeans(x, 40, seed=1, minibatch=512))


def test_a_centroid_that_nothing_is_near_to_is_put_where_it_is_of_use():
    x = torch.cat([torch.zeros(50, 2), torch.ones(1, 2) * 5, torch.ones(1, 2) * 9])
    assert sorted(kmeans(x, 3, seed=0)[:, 0].tolist()) == [0, 5, 9]


def test_our_quantiser_agrees_with_float64_on_real_hubert_features():
    x = (
        torch.from_numpy(np.load(shared("hubert_golden/sample.base.L9.npy")))
        .reshape(-1, 768)
        .float()
    )
    centroids = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:100]]
    assert len(x) == 596
    assert torch.equal(nearest(x, centroids), torch.cdist(x.double(), centroids.double()).argmin(1))


def test_real_speech_gives_as_many_frames_as_the_stored_features():
    samples = audio.load(shared("hubert_golden/6313-76958-0021.flac"))
    assert len(samples) == 190800 and len(audio.mfcc(samples)) == 596


@pytest.fixture
def folder(speedrun):
    return speedrun / "units"


def test_a_units_folder_is_what_the_design_says(folder, speedrun):
    corpus = audio.Units(folder)
    heard = sum(len(audio.load(entry["audio"])) // 320 for entry in corpus.entries)
    assert int(corpus.durations.sum()) == heard
    assert corpus.units.max() < corpus.meta["k"] == 20
    assert (folder / "units.bin").stat().st_size == 2 * corpus.offsets[-1]
    assert (folder / "recipe.json").exists()
    assert [entry["text"] for entry in corpus.entries] == [
        entry["text"] for entry in audio.read_manifest(speedrun / "toy/speech/train.jsonl")
    ]


def test_every_folder_that_hears_gives_the_same_units(speedrun):
    samples = audio.load(speedrun / "question.wav")
    said = [
        AudioTokenizer(speedrun / name)(samples)[0].tolist()
        for name in ("codebook", "units", "speech", "merged")
    ]
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
    soundfile.write(tmp_path / "short.wav", np.zeros(100, np.float32), 16000)
    (tmp_path / "m.jsonl").write_text(json.dumps({"audio": "short.wav"}) + "\n")
    with pytest.raises(ValueError, match="under one frame"):
        call(
            [
                "tokenize_audio.py", "encode", "--manifest", str(tmp_path / "m.jsonl"),
                "--codebook", str(speedrun / "codebook"), "--out", str(tmp_path / "u"),
            ],
            monkeypatch,
        )
    assert not (tmp_path / "u").exists()
    fit = ["tokenize_audio.py", "fit", "--manifest", str(tmp_path / "m.jsonl")]
    with pytest.raises(ValueError, match="--layer 9: MFCCs have no layers"):
        words = ["--features", "mfcc", "--layer", "9", "--out", str(tmp_path / "c")]
        call([*fit, *words], monkeypatch)
    with pytest.raises(ValueError, match="layers 0 to 5"):
        call(
            [
                "tokenize_audio.py", "fit", "--manifest", str(tmp_path / "m.jsonl"),
                "--hubert", str(speedrun / "hubert"), "--layer", "9",
                "--out", str(tmp_path / "c"),
            ],
            monkeypatch,
        )


def test_the_hubert_that_was_named_is_taken_whatever_lies_in_the_current_folder(
    speedrun, tmp_path, monkeypatch
):
    (tmp_path / "hubert").mkdir()
    monkeypatch.chdir(tmp_path)
    call(
        [
            "tokenize_audio.py", "fit", "--manifest", str(speedrun / "toy/speech/train.jsonl"),
            "--hubert", str(speedrun / "hubert"), "--layer", "4", "--k", "5", "--device", "cpu",
            "--out", "c",
        ],
        monkeypatch,
    )
    call([*words_of(speedrun, "u", "--hubert", str(speedrun / "hubert"))], monkeypatch)
    assert same_units(tmp_path / "u", speedrun / "units")


# --- a corpus ---


def words_of(speedrun, out, *flags):
    return [
        "tokenize_audio.py", "encode", "--manifest", str(speedrun / "toy/speech/train.jsonl"),
        "--codebook", str(speedrun / "codebook"), "--out", str(out), "--device", "cpu", *flags,
    ]


def same_units(a, b):
    return all(
        (a / name).read_bytes() == (b / name).read_bytes()
        for name in ("units.bin", "durations.bin", "index.npy", "meta.json")
    ) and [entry["text"] for entry in audio.Units(a).entries] == [
        entry["text"] for entry in audio.Units(b).entries
    ]


def test_clips_of_a_batch_get_the_units_they_get_alone(speedrun):
    ears = AudioTokenizer(speedrun / "codebook")
    clips = [audio.load(entry["audio"]) for entry in audio.Units(speedrun / "units").entries[:12]]
    together = ears.many(clips, seconds=15)
    for clip, (units, durations) in zip(clips, together):
        alone = ears(clip)
        assert edit_distance(units.tolist(), alone[0].tolist()) <= 0.02 * len(alone[0])
        assert durations.sum() == alone[1].sum() == len(clip) // 320


def test_killed_and_started_again_it_encodes_what_is_left_and_nothing_twice(
    speedrun, tmp_path, monkeypatch
):
    monkeypatch.setattr(tokenize_audio, "AHEAD", 4)
    call(words_of(speedrun, tmp_path / "straight"), monkeypatch)
    many, heard = AudioTokenizer.many, []

    def dying(self, clips, seconds=40):
        heard.append(len(clips))
        if len(heard) == 3:
            raise KeyboardInterrupt
        return many(self, clips, seconds)

    monkeypatch.setattr(AudioTokenizer, "many", dying)
    with pytest.raises(KeyboardInterrupt):
        call(words_of(speedrun, tmp_path / "killed"), monkeypatch)
    assert not (tmp_path / "killed").exists()
    with open(tmp_path / "killed.partial/units.bin", "ab") as file:
        # Written behind the last mark, as a kill leaves it.
        file.write(b"half of something")
    call(words_of(speedrun, tmp_path / "killed"), monkeypatch)
    n = len(audio.Units(tmp_path / "straight").entries)
    assert same_units(tmp_path / "killed", tmp_path / "straight")
    assert sum(heard) - heard[2] == n, "every clip once, but for those in the air"
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == sorted(
        p.name for p in (tmp_path / "straight").iterdir()
    )


def test_several_processes_write_what_one_does(speedrun, tmp_path, monkeypatch):
    # One clip a batch: the same roundings however the list is cut.
    monkeypatch.setattr(tokenize_audio, "AHEAD", 1)
    exact = "--dtype", "float32"
    call([*words_of(speedrun, tmp_path / "one"), *exact], monkeypatch)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in ("2", "1", "0"):
        monkeypatch.setenv("RANK", rank)
        # The slash is as a shell completes it.
        call([*words_of(speedrun, f"{tmp_path}/three/"), *exact], monkeypatch)
    monkeypatch.setenv("RANK", "1")  # which waits for nobody
    with pytest.raises(ValueError, match="auto for 3 processes on a CPU"):
        call(words_of(speedrun, tmp_path / "four"), monkeypatch)
    assert same_units(tmp_path / "one", tmp_path / "three")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "three"]


@pytest.mark.parametrize("features", [["mfcc"], {"kind": "wavlm"}, {"kind": "hubert"}])
def test_a_codebook_of_unknown_features_is_one_line(features, speedrun, tmp_path):
    shutil.copytree(speedrun / "codebook", tmp_path / "c")
    made = json.loads((tmp_path / "c/codebook.json").read_text()) | {"features": features}
    (tmp_path / "c/codebook.json").write_text(json.dumps(made))
    with pytest.raises(ValueError, match="codebook.json: got features .*fit again"):
        AudioTokenizer(tmp_path / "c")


def test_a_long_recording_may_end_before_its_estimate(monkeypatch):
    """The length of an MP3 is estimated where its header does not tell it."""

    class Promised:
        def __init__(self, path):
            self.samples = np.full(2 * tokenize_audio.LONG, 0.1, dtype=np.float32)

        def __len__(self):
            return len(self.samples) + 100

        def __getitem__(self, part):
            return self.samples[part]

    monkeypatch.setattr(audio, "Recording", Promised)
    clip = tokenize_audio.read_clip("x.mp3", 320)
    assert not clip.error and not clip.silent


def test_bad_clips_stop_the_run_in_one_line_or_are_listed_with_their_reason(
    speedrun, tmp_path, monkeypatch, capsys
):
    import soundfile

    (tmp_path / "bad.wav").write_text("not audio")
    soundfile.write(tmp_path / "short.wav", np.zeros(100, np.float32), 16000)
    soundfile.write(tmp_path / "good.wav", 0.1 * np.sin(np.arange(16000) / 9), 16000)
    (tmp_path / "m.jsonl").write_text(
        "".join(json.dumps({"audio": f"{name}.wav"}) + "\n" for name in ("good", "bad", "short"))
    )
    words = words_of(speedrun, tmp_path / "u", "--manifest", str(tmp_path / "m.jsonl"))
    with pytest.raises(ValueError, match="bad.wav: not audio that soundfile reads.*--skip-bad"):
        call(words, monkeypatch)
    call([*words, "--skip-bad"], monkeypatch)
    listed = [json.loads(line) for line in (tmp_path / "u/skipped.jsonl").read_text().splitlines()]
    assert [Path(entry["audio"]).name for entry in listed] == ["bad.wav", "short.wav"]
    assert "under one frame" in listed[1]["why"]
    assert len(audio.Units(tmp_path / "u").entries) == 1
    assert "1 clips, 2 skipped" in capsys.readouterr().out


def test_a_codebook_is_fitted_without_the_clips_that_cannot_be_read(
    speedrun, tmp_path, monkeypatch, capsys
):
    entries = [
        json.loads(line) for line in (speedrun / "toy/speech/train.jsonl").read_text().splitlines()
    ]
    (tmp_path / "bad.wav").write_text("not audio")
    entries = [{"audio": str(speedrun / "toy/speech" / e["audio"])} for e in entries[:4]] + [
        {"audio": "bad.wav"}
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    words = [
        "tokenize_audio.py", "fit", "--manifest", str(tmp_path / "m.jsonl"),
        "--features", "mfcc", "--k", "4", "--device", "cpu", "--out", str(tmp_path / "c"),
    ]
    with pytest.raises(ValueError, match="bad.wav: not audio"):
        call(words, monkeypatch)
    call([*words, "--skip-bad"], monkeypatch)
    assert "left out" in "".join(capsys.readouterr())
    assert (tmp_path / "c/codebook.json").exists()


def test_word_times_behind_the_end_of_a_clip_are_told(
    speedrun, tmp_path, monkeypatch
):
    entry = json.loads((speedrun / "toy/speech/train.jsonl").read_text().splitlines()[0])
    entry["audio"] = str(speedrun / "toy/speech" / entry["audio"])
    (tmp_path / "m.jsonl").write_text(
        json.dumps(entry | {"text": "a b", "words": [["a", 0, 350], ["b", 350, 800]]}) + "\n"
    )
    with pytest.raises(ValueError, match="'b' begins at 350 s, behind its"):
        call(
            words_of(speedrun, tmp_path / "u", "--manifest", str(tmp_path / "m.jsonl")), monkeypatch
        )
    for words, said in ((5, "wanted a list"), ([["a", 1, 2], ["b", 0, 1]], "not in the order")):
        entries = json.dumps(entry | {"text": "a b", "words": words}) + "\n"
        (tmp_path / "m.jsonl").write_text(entries)
        with pytest.raises(ValueError, match=said):
            audio.read_manifest(tmp_path / "m.jsonl")


def test_a_stopped_encode_goes_on_only_with_the_same_arithmetic_and_price_of_a_change(
    speedrun, tmp_path, monkeypatch
):
    shutil.copytree(speedrun / "codebook", tmp_path / "codebook")
    words = [
        "tokenize_audio.py", "encode", "--manifest", str(speedrun / "toy/speech/train.jsonl"),
        "--codebook", str(tmp_path / "codebook"), "--device", "cpu", "--dtype", "float32",
        "--out", str(tmp_path / "v"),
    ]
    save = tokenize_audio.Shard.save

    def dying(*given):
        save(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tokenize_audio.Shard, "save", dying)
        with pytest.raises(KeyboardInterrupt):
            call(words, monkeypatch)
    with pytest.raises(ValueError, match="of a run with another dtype .float32, now bfloat16"):
        call([*words, "--dtype", "bfloat16"], monkeypatch)
    file = tmp_path / "codebook/codebook.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"switch": 0.0}))
    with pytest.raises(ValueError, match="of a run with another codebook"):
        call(words, monkeypatch)


@pytest.mark.parametrize(
    "rank, said",
    [
        ("5 2", "RANK 5 of WORLD_SIZE 2"),
        ("0 9999", "no more processes than clips"),
        ("x 2", "RANK x of"),
    ],
)
def test_processes_that_make_no_sense_are_told_before_anything_is_encoded(
    speedrun, tmp_path, monkeypatch, rank, said
):
    for name, value in zip(("RANK", "WORLD_SIZE"), rank.split()):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        call(words_of(speedrun, tmp_path / "u"), monkeypatch)
    assert not list(tmp_path.iterdir())


def test_a_long_file_is_heard_in_windows_nearly_as_in_one_piece(speedrun, monkeypatch):
    ears = AudioTokenizer(speedrun / "codebook")
    samples = np.concatenate(
        [audio.load(entry["audio"]) for entry in audio.Units(speedrun / "units").entries[:8]]
    )
    whole = np.repeat(*ears(samples))
    monkeypatch.setattr(tokenize_audio, "LONG", 5 * 16000)
    cut = np.repeat(*ears(samples))
    assert len(samples) > 12 * 16000 and len(cut) == len(whole) == len(samples) // 320
    assert [
        sum(window[3] for window in tokenize_audio.windows(n, 320))
        for n in (100, 80000, 200000, 239999)
    ] == [0, 250, 625, 749]
    assert (
        cut == whole
    ).mean() > 0.5, (
        "an untrained HuBERT's clusters follow the mean of what it hears; see "
        "bench/tokenizer.py for a trained one"
    )


def test_a_long_file_of_any_length_is_encoded_in_the_memory_of_its_windows(
    speedrun, quick, tmp_path
):
    """Six minutes of eight channels (six silent: FLAC is quick then) at 44.1 kHz would be 510
    MB if read at once.
    """
    import soundfile

    with soundfile.SoundFile(tmp_path / "long.flac", "w", 44100, 8, "PCM_16") as file:
        minute = (
            0.1 * np.random.default_rng(0).standard_normal((60 * 44100, 8)) * (np.arange(8) < 2)
        )
        for _ in range(6):
            file.write(minute)
    soundfile.write(tmp_path / "short.wav", minute[:16000, 0], 16000)
    peaks = {}
    for name in ("short.wav", "long.flac"):
        (tmp_path / "m.jsonl").write_text(json.dumps({"audio": name}) + "\n")
        words = words_of(
            speedrun, tmp_path / name.partition(".")[0],
            "--manifest", str(tmp_path / "m.jsonl"),
            "--codebook", str(speedrun / "codebook_mfcc"),
        )
        done = subprocess.run(
            [
                quick / "python", "-c",
                "import runpy, sys; sys.argv = sys.argv[1:]; "
                "runpy.run_path(sys.argv[0], run_name='__main__'); "
                "sys.path.append('tests'); from memory import peak; print('PEAK', round(peak()))",
                *words,
            ],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr
        peaks[name] = int(done.stdout.rpartition("PEAK")[2])
    # By windows of a minute it is 360 here; read at once, 1,200.
    assert peaks["long.flac"] - peaks["short.wav"] < 700, f"MB: {peaks}"
    assert audio.Units(tmp_path / "long")[0][1].sum() == 6 * 60 * 50


def test_two_encodes_of_one_folder_do_not_mix(speedrun, quick, tmp_path):
    code = (
        "import runs, time\n"
        f"with runs.new_folder({str(tmp_path / 'u')!r}):\n"
        "    print('mine', flush=True)\n"
        "    time.sleep(60)"
    )
    other = subprocess.Popen([quick / "python", "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"mine\n"
    done = subprocess.run(
        [quick / "python", ROOT / "tokenize_audio.py", *words_of(speedrun, tmp_path / "u")[1:]],
        capture_output=True,
        text=True,
    )
    other.kill()
    other.wait()
    assert done.returncode == 1
    assert "another process is writing it" in done.stderr
    assert not (tmp_path / "u").exists()


def test_a_stopped_encode_notices_that_the_folder_of_audio_has_changed(
    speedrun, tmp_path, monkeypatch
):
    (tmp_path / "audio").mkdir()
    for name in "abcd":
        soundfile.write(
            tmp_path / f"audio/{name}.wav",
            0.1 * np.random.default_rng(ord(name)).standard_normal(8000), 16000,
        )
    words = [
        "tokenize_audio.py", "encode", "--manifest", str(tmp_path / "audio"),
        "--codebook", str(speedrun / "codebook"), "--out", str(tmp_path / "u/"),
        "--device", "cpu",
    ]
    monkeypatch.setattr(tokenize_audio, "AHEAD", 2)
    real, chunks = tokenize_audio.ahead, []

    def stops(entries, decode):
        for chunk in real(entries, decode):
            if chunks:
                raise KeyboardInterrupt
            chunks.append(chunk)
            yield chunk

    monkeypatch.setattr(tokenize_audio, "ahead", stops)
    with pytest.raises(KeyboardInterrupt):
        call(words, monkeypatch)
    monkeypatch.setattr(tokenize_audio, "ahead", real)
    soundfile.write(tmp_path / "audio/0.wav", np.zeros(8000), 16000)
    (tmp_path / "audio/d.wav").unlink()
    with pytest.raises(ValueError, match="is of a run with another audio"):
        call(words, monkeypatch)


def test_a_file_shorter_than_its_mark_is_refused_and_not_filled_with_zeros(tmp_path):
    (tmp_path / "units.bin").write_bytes(b"12")
    with pytest.raises(ValueError, match="2 bytes, its mark says 4"):
        runs.reopened(tmp_path / "units.bin", 4)
    assert (tmp_path / "units.bin").read_bytes() == b"12"
    with runs.reopened(tmp_path / "units.bin", 1) as file:
        assert file.tell() == 1
    assert (tmp_path / "units.bin").read_bytes() == b"1"


def test_units_that_hardly_ever_change_are_told(capsys):
    counts = dict.fromkeys(("skipped", "silent", "clipped"), 0) | {"seconds": 30.0}
    tokenize_audio.tell("out/units", counts, np.ones(9, int))
    assert "under one unit a second" in capsys.readouterr().err
    tokenize_audio.tell("out/units", counts, np.full(9, 50))
    assert not capsys.readouterr().err


def test_an_empty_manifest_has_nothing_to_fit_on(tmp_path, monkeypatch):
    (tmp_path / "m.jsonl").write_text("")
    with pytest.raises(ValueError, match="m.jsonl: empty"):
        call(
            [
                "tokenize_audio.py", "fit", "--manifest", str(tmp_path / "m.jsonl"),
                "--features", "mfcc", "--out", str(tmp_path / "c"),
            ],
            monkeypatch,
        )


def test_features_have_the_mean_of_their_clip_taken_out_and_units_the_price_of_a_change(speedrun):
    ears = AudioTokenizer(speedrun / "codebook")
    clip = audio.load(speedrun / "question.wav")
    (x,) = ears.features([clip])
    assert len(x) == len(clip) // audio.HOP and x.mean(0).abs().max() < 1e-4 < x.abs().max()
    assert ears.recipe["switch"] > 0
    units, durations = ears(clip)
    assert (
        np.repeat(units, durations).tolist()
        == steady([x], ears.centroids, ears.recipe["switch"])[0].tolist()
        != nearest(x, ears.centroids).tolist()
    )


def test_a_picture_shows_a_sound_its_frames_and_its_units(speedrun, tmp_path, monkeypatch, capsys):
    words = [
        "tokenize_audio.py", "draw", str(speedrun / "question.wav"),
        "--codebook", str(speedrun / "codebook"), "--device", "cpu",
        "--out", str(tmp_path / "q.png"),
    ]
    call(words, monkeypatch)
    samples = audio.load(speedrun / "question.wav")
    units, durations = AudioTokenizer(speedrun / "codebook")(samples)
    assert (tmp_path / "q.png").read_bytes().startswith(b"\x89PNG")
    assert (
        f"{len(samples)} samples, {len(samples) // 320} frames, {len(units)} units"
        in capsys.readouterr().out
    )
    with pytest.raises(FileExistsError, match="pass --overwrite"):
        call(words, monkeypatch)
    with pytest.raises(ValueError, match="ends in .png"):
        call([*words, "--out", str(tmp_path / "q.jpg")], monkeypatch)


def test_the_price_of_a_change_is_counted_in_mean_squared_distances(
    speedrun, tmp_path, monkeypatch
):
    (tmp_path / "one.jsonl").write_text(
        json.dumps({"audio": str(speedrun / "question.wav")}) + "\n"
    )
    words = [
        "tokenize_audio.py", "fit", "--manifest", str(tmp_path / "one.jsonl"),
        "--features", "mfcc", "--k", "5", "--switch", "2",
    ]
    call([*words, "--device", "cpu", "--out", str(tmp_path / "c")], monkeypatch)
    ears = AudioTokenizer(tmp_path / "c")
    (x,) = ears.features([audio.load(speedrun / "question.wav")])
    distance = (x - ears.centroids[nearest(x, ears.centroids)]).pow(2).sum(1).mean().item()
    assert ears.recipe["switch"] == pytest.approx(2 * distance, rel=1e-4)


def test_a_hubert_that_nothing_reads_is_refused(speedrun):
    with pytest.raises(ValueError, match="hears without one"):
        AudioTokenizer(speedrun / "codebook_mfcc", hubert=speedrun / "hubert")


def test_a_corpus_of_unreadable_clips_is_told(tmp_path, monkeypatch):
    (tmp_path / "a.wav").write_text("no sound")
    (tmp_path / "m.jsonl").write_text('{"audio": "a.wav"}\n')
    with pytest.raises(ValueError, match="not one clip of it could be read"):
        call(
            [
                "tokenize_audio.py", "fit", "--manifest", str(tmp_path / "m.jsonl"),
                "--features", "mfcc", "--k", "2", "--skip-bad", "--device", "cpu",
                "--out", str(tmp_path / "c"),
            ],
            monkeypatch,
        )
