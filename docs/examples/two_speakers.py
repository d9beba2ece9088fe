"""Two speakers continue two recordings. Written for the reference implementation: only the import differs.

``python docs/examples/two_speakers.py a.wav "What a says." b.wav "What b says."`` writes conversation.wav.
"""

import sys

import sphn
import torch

from csm import Segment, load_csm_1b  # was: from generator import Segment, load_csm_1b


def prepare_prompt(text, speaker, path, sample_rate):
    samples, _ = sphn.read(path, sample_rate=sample_rate)
    return Segment(text=text, speaker=speaker, audio=torch.from_numpy(samples).mean(dim=0))


def main(path_a, text_a, path_b, text_b):
    generator = load_csm_1b(device="cuda" if torch.cuda.is_available() else "cpu")
    prompts = [
        prepare_prompt(text_a, 0, path_a, generator.sample_rate),
        prepare_prompt(text_b, 1, path_b, generator.sample_rate),
    ]
    spoken = []
    for speaker, text in [
        (0, "Did you read the paper that I sent you?"),
        (1, "Twice. The second time I even understood it."),
        (0, "Then you are ahead of me."),
    ]:
        audio = generator.generate(
            text=text,
            speaker=speaker,
            context=prompts + spoken,
            max_audio_length_ms=10_000,
        )
        spoken.append(Segment(text=text, speaker=speaker, audio=audio))

    conversation = torch.cat([segment.audio for segment in spoken])
    sphn.write_wav("conversation.wav", conversation.cpu().numpy(), generator.sample_rate)


if __name__ == "__main__":
    main(*sys.argv[1:])
