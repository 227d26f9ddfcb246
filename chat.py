"""Talk to a merged model: spoken questions (audio files) and typed ones, in one conversation, answered as they are written.

in   a model folder that hears; paths of audio, or lines typed       out  replies, streamed
see  the spoken turn of vocab.py: <|im_start|>user\\n<|speech|> units <|/speech|><|im_end|>\\n<|im_start|>assistant\\n
run  python chat.py out/merged out/question.wav         # answers and exits; without audio it asks for lines
"""
import argparse
import codecs
import sys
from pathlib import Path

import torch

import audio
import weights
from model import LM, generate
from tokenize_audio import AudioTokenizer
from vocab import Vocab

LIMIT = 256                                             # tokens in a reply
HELP = "a line is a typed turn, a path to audio a spoken one; :reset forgets the conversation, :quit (or Ctrl-D) ends it"


class Chat:
    """A conversation with the model of a folder. `messages` is what was said, spoken turns as their units."""

    def __init__(self, folder, device="cpu", hubert=None, temperature=0.0):
        self.model, self.vocab = LM.load(folder, device).eval(), Vocab(folder)
        self.vocab.markers()                                                # a ValueError now rather than at the first turn
        self.ears = AudioTokenizer(folder, device, hubert) if self.vocab.speech else None
        self.folder, self.temperature, self.messages = folder, temperature, []

    def listen(self, path):
        """(units, seconds) of an audio file."""
        if not self.ears:
            raise ValueError(f"{self.folder} cannot hear (no speech.json); chat with a merged model, or type")
        samples = audio.load(path)
        if len(samples) < self.ears.hop:
            raise ValueError(f"{path}: {len(samples)} samples at 16 kHz, too short to hear anything")
        return self.ears(samples)[0], len(samples) / audio.SAMPLE_RATE

    def reply(self, content):
        """Yield the reply to a turn, text or units, piece by piece; whole characters only. The turn and what was said of the
        reply join the conversation, also when the caller stops early."""
        self.messages.append({"role": "user", "content": content})
        room = self.model.config.max_position_embeddings - LIMIT
        while len(prompt := self.vocab.turn(self.messages)) > room:
            if len(self.messages) == 1:
                self.messages.clear()
                raise ValueError(f"the turn alone takes {len(prompt)} tokens, the model's context leaves {room}; say less at once")
            del self.messages[:2]
            yield "[the oldest turns no longer fit and are forgotten] "
        said, whole = "", codecs.getincrementaldecoder("utf-8")("replace")
        try:
            for ids in generate(self.model, [torch.tensor(prompt)], LIMIT, self.vocab.stop, self.vocab.text_rows(), self.temperature):
                piece = whole.decode(self.vocab.bytes_of.get(int(ids[0]), b""))
                said += piece
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": said})

    def heard(self, units):
        """The model's own transcript of units: what it understood."""
        ids = [int(i[0]) for i in generate(self.model, [torch.tensor(self.vocab.heard(units))], LIMIT, self.vocab.stop, self.vocab.text_rows())]
        return self.vocab.decode(ids).strip().removesuffix(".")


def turn(chat, line, transcribe, spoken=False):
    """Answer one line on the screen, a path to audio if `spoken` or if it looks like one. True if it went well; a bad input is one line on stderr."""
    path = Path(line.strip("'\"")).expanduser()
    spoken = spoken or path.suffix.lower() in audio.AUDIO or line.startswith(("/", "./", "~")) or path.is_file()
    try:
        content = line
        if spoken:
            content, seconds = chat.listen(path)
            print(f"[{path}: {seconds:.2f} s, {len(content)} units]")
            if transcribe:
                print(f"heard: {chat.heard(content)}")
        print("model: ", end="", flush=True)
        for piece in chat.reply(content):
            print(piece, end="", flush=True)
        print()
        return True
    except (ValueError, OSError) as error:
        said = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        print(f"cannot answer that: {said}", file=sys.stderr)
    except KeyboardInterrupt:
        print(" [stopped]")
    return False


def main():
    parser = argparse.ArgumentParser(description="Talk to a model: audio files are spoken turns, lines typed ones.")
    parser.add_argument("folder", help="a merged model folder (an instruct model can be typed to)")
    parser.add_argument("audio", nargs="*", help="audio files to answer, one after the other; then exit")
    parser.add_argument("--transcribe", action="store_true", help="show what the model heard before it answers")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 always gives the likeliest reply (default); 0.7 varies it")
    parser.add_argument("--hubert", help="the HuBERT folder, if it was too big to travel with the model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (default: cuda if there is one)")
    args = parser.parse_intermixed_args()                                   # so that flags may stand between the folder and the audio
    if not args.temperature >= 0:
        raise ValueError(f"--temperature {args.temperature}: wanted 0 or more")
    chat = Chat(args.folder, args.device, args.hubert, args.temperature)
    if args.audio:
        sys.exit(not all([turn(chat, path, args.transcribe, spoken=True) for path in args.audio]))
    print(HELP)
    while True:
        try:
            line = input("you: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == ":quit":
            return
        if line == ":reset":
            chat.messages.clear()
        elif line.startswith(":"):
            print(HELP)
        elif line:
            turn(chat, line, args.transcribe)


if __name__ == "__main__":
    weights.run(main)
