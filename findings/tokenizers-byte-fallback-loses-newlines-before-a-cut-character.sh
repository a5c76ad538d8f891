#!/usr/bin/env bash
# tokenizers 0.23.3 decodes a newline as U+FFFD where the character behind it is cut.
#
# A tokenizer of SentencePiece's kind (Llama 2, Vicuna, Mistral 7B) writes what it has no piece for as tokens of one byte, and a newline
# is one: `<0x0A>`. Its `tokenizer.json` decodes them by the decoder `ByteFallback`, which takes a run of such tokens as a whole: is the run no
# valid UTF-8, every byte of it becomes U+FFFD, the valid ones too. An answer that is cut within an emoji or a Chinese character, by a limit of
# tokens or because it is shown as it is written, loses the newlines and all other bytes before it in the run, which come back with the
# next token. SentencePiece 0.2.3 itself keeps them, from the same ids.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet tokenizers==0.23.3 sentencepiece==0.2.3

cat > "$work/decode.py" <<'PY'
import io

import sentencepiece
from tokenizers import Tokenizer, decoders, models

trained = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["the answer is a swimmer"] * 50),
    model_writer=trained,
    model_type="bpe",
    vocab_size=290,
    byte_fallback=True,
    minloglevel=2,
)
reference = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
vocab = {reference.id_to_piece(i): i for i in range(reference.vocab_size())}
tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
tokenizer.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
ids = [vocab[f"<0x{byte:02X}>"] for byte in "\n\n🏊".encode()]
ids = reference.encode("the answer is") + ids
for cut in (4, 3, 2, 1, 0):
    shown = ids[: len(ids) - cut]
    print(f"{cut} bytes missing: sentencepiece {reference.decode(shown)!r}, tokenizers {tokenizer.decode(shown)!r}")
PY

cat > "$work/expected" <<'TXT'
4 bytes missing: sentencepiece 'the answer is\n\n', tokenizers 'the answer is\n\n'
3 bytes missing: sentencepiece 'the answer is\n\n�', tokenizers 'the answer is���'
2 bytes missing: sentencepiece 'the answer is\n\n��', tokenizers 'the answer is����'
1 bytes missing: sentencepiece 'the answer is\n\n���', tokenizers 'the answer is�����'
0 bytes missing: sentencepiece 'the answer is\n\n🏊', tokenizers 'the answer is\n\n🏊'
TXT
cd "$work"
"$work/venv/bin/python" decode.py | tee seen
diff expected seen || { echo "CHANGED"; exit 1; }
echo "as described"
