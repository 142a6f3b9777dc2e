"""Many processes that create the same names at the same moments: how often did how many succeed?

    python -m tests.race s3://bucket/prefix ROUNDS [obstore|s3fs]

It prints JSON: {"rounds": so many, "winners": {a number of winners: the rounds that had so many}}.

A process of its own, since a client of S3 that was used before a fork doesn't survive that. Each round has a name of
its own; many of them go on at once, as the server lets those that race wait for up to a second. A winner is who was
told so; that the name holds the winner's bytes is looked at by another client.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.sharedctypes import SynchronizedArray
from multiprocessing.synchronize import Barrier

from dtrain.storage.places import storage_at
from tests.places import Place

RACERS = 16
_AT_ONCE = 32


def race(number: int, root: str, client: str, gate: Barrier, won: SynchronizedArray[int]) -> None:
    storage = storage_at(root, {"client": client})
    rounds = len(won) // RACERS

    def turn(name: int) -> None:
        try:
            storage.create(f"log/{name:08d}.json", f"{number} {name}".encode())
            won[name * RACERS + number] = 1
        except FileExistsError:
            pass

    gate.wait()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(turn, range(rounds)))


def main() -> None:
    root, rounds, client = sys.argv[1], int(sys.argv[2]), (*sys.argv[3:], "obstore")[0]
    fork = multiprocessing.get_context("fork")
    gate, won = fork.Barrier(RACERS), fork.Array("i", RACERS * rounds)
    racers = [fork.Process(target=race, args=(n, root, client, gate, won)) for n in range(RACERS)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert all(racer.exitcode == 0 for racer in racers)
    winners = [[n for n in range(RACERS) if won[name * RACERS + n]] for name in range(rounds)]
    place = Place(root)
    for name, found in enumerate(winners):
        if len(found) == 1:
            assert place.read(f"log/{name:08d}.json") == f"{found[0]} {name}".encode()
    print(json.dumps({"rounds": rounds, "winners": Counter(len(found) for found in winners)}))


if __name__ == "__main__":
    main()
