"""How often Ray Data's executor looks for what is done. All processes of a stream import this with its context."""

from typing import TYPE_CHECKING

from ray.data._internal.execution.execution_callback import ExecutionCallback

if TYPE_CHECKING:
    from ray.data._internal.execution.streaming_executor import StreamingExecutor


class Often(ExecutionCallback):
    """Has the executor look each 0.01 s as long as anything is not done, in place of each 0.1 s.

    What a stage has made waits for that, once more before a train worker, and a sampler for its next micro-batch; at policy_lag 0
    nothing else is done meanwhile. It takes up to a sixth of a core more, so streams where two steps overlap have Ray's own.
    Ray has no setting for it: its constant is set in the executor's process, and a test watches that the executor goes by it.
    """

    seconds = 0.01

    def before_execution_starts(self, executor: "StreamingExecutor") -> None:
        """Once, in that process."""
        from ray.data._internal.execution import streaming_executor_state

        streaming_executor_state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S = self.seconds
