"""`python jobs/train_demo_model.py --out FOLDER`: trains the embedded model anew, 14 minutes on one CPU core."""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

from batchgen.training.accuracy import Examinee, list_questions, measure
from batchgen.training.recipe import Recipe
from batchgen.training.save import save_model
from batchgen.training.train import train


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=Recipe().num_steps)
    parser.add_argument("--seed", type=int, default=Recipe().seed)
    parser.add_argument("--questions", type=int, default=500, help="held-out questions to ask afterwards, in each mode")
    options = parser.parse_args()
    recipe = Recipe(seed=options.seed, num_steps=options.steps)
    started_at, cpu_started_at = time.perf_counter(), time.process_time()
    model = train(recipe, lambda step, loss: print(f"step {step} loss {loss:.5f}", flush=True))
    seconds = {"wall_s": time.perf_counter() - started_at, "cpu_s": time.process_time() - cpu_started_at}
    save_model(model, options.out)
    examinee, accuracies = Examinee(options.out), {}
    for thinking, temperature in ((False, 0.0), (False, 1.0), (True, 0.0), (True, 1.0)):
        questions = list_questions(options.questions, thinking=thinking, held_out=True)
        accuracy = measure(examinee.ask(questions, thinking=thinking, temperature=temperature))
        accuracies[f"{'thinking' if thinking else 'chat'} T={temperature:g}"] = accuracy.as_json()
    print(json.dumps({"recipe": dataclasses.asdict(recipe), **seconds, "held_out": accuracies}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
