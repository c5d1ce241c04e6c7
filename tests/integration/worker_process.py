"""A worker that takes commands as lines of JSON, and answers with lines of JSON that carry a monotonic time."""

import json
import sys
import time

import syncbn


def say(**answer: object) -> None:
    print(json.dumps({**answer, "at": time.monotonic()}), flush=True)


def main() -> None:
    with syncbn.Worker(**json.loads(sys.argv[1])) as worker:
        say(
            joined=worker.rank,
            run_id=worker.run_id,
            incarnation=worker.incarnation,
            transport=worker.stats().transport,
        )
        for line in sys.stdin:
            command = json.loads(line)
            try:
                if "sum" in command:
                    say(result=list(worker.all_reduce(command["sum"], command["value"])))
                elif "sum_long" in command:
                    ones = [1.0] * command["length"]
                    sums = [worker.all_reduce(command["sum_long"], ones) for _ in range(command["times"])]
                    say(result=[len(sums), min(map(min, sums)), max(map(max, sums))])
                elif "forward" in command:
                    zeros = [0.0] * command["channels"]
                    say(result=worker.synchronize(command["forward"], 1, zeros, zeros).count)
                elif "resume_at" in command:
                    worker.resume_at(command["resume_at"])
                    say(resumed=True)
                elif "sums_until_error" in command:
                    say(began=True)
                    sums = []
                    try:
                        while True:
                            value = [1.0 + worker.rank, float(len(sums))]
                            sums.append(list(worker.all_reduce(command["sums_until_error"], value)))
                    finally:
                        say(sums=sums)
                elif "sum_for_ever" in command:
                    say(began=True)
                    while True:
                        worker.all_reduce(command["sum_for_ever"], [1.0])
                else:
                    break
            except syncbn.Error as error:
                say(
                    error=error.reason,
                    code=error.code.name,
                    layer=error.layer,
                    ranks=list(error.ranks),
                    message=error.message,
                )


main()
