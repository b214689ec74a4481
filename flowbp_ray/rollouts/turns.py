"""When Ray Data's executor looks for what is done. All processes of a stream import this with its context."""

from typing import TYPE_CHECKING

import ray
from ray.data._internal.execution.execution_callback import ExecutionCallback

if TYPE_CHECKING:
    from ray.data._internal.execution.streaming_executor import StreamingExecutor


class AtOnce(ExecutionCallback):
    """Has the executor look as soon as anything is done.

    By itself it looks each 0.1 s as long as anything is not done. What a stage has made waits for that, once more before a train
    worker, and a sampler twice for its next micro-batch.
    Ray has no setting for it: its constant is set in the executor's process, and a test watches that the executor goes by it.
    """

    #: Seconds that it waits for more to be done, where something is; so often it looks where what is done may not be read yet.
    gathers = 0.005
    #: Seconds after which it looks if nothing is: not all that it waits for is a task.
    looks_anyway = 0.1

    def before_execution_starts(self, executor: "StreamingExecutor") -> None:
        """Once, in that process."""
        from ray.data._internal.execution import streaming_executor_state

        streaming_executor_state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S = self.gathers

    def on_execution_step(self, executor: "StreamingExecutor") -> None:
        """After each look."""
        operators = list(executor._topology or ())
        if not any(operator.has_next() for operator in operators):  # else it hands on what it has, without a task
            tasks = [task.get_waitable() for operator in operators for task in operator.get_active_tasks()]
            if tasks:
                ray.wait(tasks, num_returns=1, timeout=self.looks_anyway, fetch_local=False)
