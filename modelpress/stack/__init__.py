"""The local stack: the programs that a team shares, on one machine, for one user; `modelpress up` and its sisters.

One folder holds all of it: `$MODELPRESS_STACK`, else `$MODELPRESS_HOME/stack`, else
`~/.local/share/modelpress/stack`::

    stack.json     what was chosen once: identity, ports, store, checkout; it marks the folder as a stack's
    state.json     how each part is, written by the supervisor alone
    lock           held (flock) by whoever starts the stack, then by its supervisor for as long as it lives
    keys/          credentials, made once, mode 0600; `environment` is what a shell sources
    logs/          one file per part, and one older one; the supervisor cuts them by size
    s3/ prefect/ mlflow/ home/     what the parts keep

`up` takes the lock, hands it to a supervisor in a session of its own, and waits until every part is healthy; what does
not get there ends the whole start, and nothing stays half up. The supervisor starts parts in the order of what they
need, looks after their health, starts again what dies (after growing waits, until it died too often), and stops them
in reverse order. It writes; `status`, `logs`, `env` and `down` read, and `down` sends it a signal.

**Whose process is it?** Every process of a stack has `MODELPRESS_STACK_PART=<identity>/<part>` in its environment, and
its children inherit it, whatever session they move to. Nothing is killed by a recorded number, which may be another's
by now. A supervisor that is killed takes its parts with it (Linux sends them SIGTERM), and the next `up` or `down`
ends whatever still carries the mark.

**Secrets** go through files and environments, which other users can't read; never through command lines or logs.

| module | idea |
|---|---|
| `layout` | the folder, what was chosen, the state, the lock |
| `credentials` | the keys and the shell's environment |
| `parts` | which programs, with which settings |
| `prepare` | what is done once they run: buckets, users, pools, deployments |
| `processes` | start, find and end processes |
| `supervisor` | the loop that keeps them |
| `control` | up, down, delete, seen from a command |
"""
