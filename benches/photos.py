"""Training records from captioned photographs: one a caption, and two yes/no questions a photograph.

  python3 benches/photos.py photos/captions.jsonl > records.jsonl

Reads records with `frames` and `captions`; writes conversations for `vora train`. Each photograph is asked about with
one of its own captions (yes) and with one of another photograph (no), drawn with a fixed seed.
"""

import json
import random
import sys


def record(photo, kind, question, answer):
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": f"{photo['id']}_{kind}", "frames": photo["frames"], "conversations": turns}


def asked(caption):
    return f'Does this caption describe the image? "{caption}" Answer yes or no.'


def plain(caption):
    caption = caption.strip().replace(" .", ".").replace(" ,", ",")
    return caption if caption.endswith(".") else caption + "."


def main():
    photos = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
    draw = random.Random(0)
    for i, photo in enumerate(photos):
        captions = [plain(caption) for caption in photo["captions"]]
        records = [record(photo, n, "Describe this image.", caption) for n, caption in enumerate(captions)]
        other = photos[(i + draw.randrange(1, len(photos))) % len(photos)]
        records.append(record(photo, "yes", asked(draw.choice(captions)), "yes"))
        records.append(record(photo, "no", asked(plain(draw.choice(other["captions"]))), "no"))
        for line in records:
            print(json.dumps(line))


main()
