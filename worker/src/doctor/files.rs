//! Checks of the files that a worker keeps and reads.

use super::facts::{Access, Facts, ListFacts, RunningWorker, StateFacts};
use super::{Finding, Level};

pub(super) fn state(facts: &Facts) -> Vec<Finding> {
    let StateFacts { dir, user, access, .. } = &facts.state;
    let dir = dir.display();
    let make = format!("`install -d -m 700 -o {user} {dir}`, or name another state_dir");
    let is_kept = facts.running.as_ref().is_some_and(|running| running.keeps_state);
    let kept = match access {
        _ if is_kept => Finding::ok("state", format!("the running worker writes to {dir}")),
        Access::Granted => Finding::ok("state", format!("{user} may write to {dir}")),
        Access::Creatable => Finding::ok("state", format!("{dir} is not there yet, and {user} may make it")),
        Access::OnlyFor(other) => Finding::warn(
            "state",
            format!("{dir} is writable for {other} and not for {user}"),
            format!("start the worker as {other} (User= of its unit, or worker_user), or {make}"),
        ),
        Access::Denied(reason) => Finding::fail("state", format!("{user} cannot write to {dir}: {reason}"), make),
    };
    [kept].into_iter().chain(holder(facts)).collect()
}

/// Whether it is the worker that answers here which has the state file.
fn holder(facts: &Facts) -> Option<Finding> {
    let holder = match &facts.state.holder {
        Ok(holder) => holder.as_ref()?,
        Err(error) => {
            let found = format!("who has the state file cannot be told: {error}");
            return Some(Finding::warn("state", found, "run the doctor as root"));
        }
    };
    Some(match &facts.running {
        Some(RunningWorker { pid, .. }) if holder.pid.is_none_or(|holder| holder == *pid) => {
            Finding::ok("state", "the running worker has its state file")
        }
        Some(RunningWorker { pid, .. }) => Finding::fail(
            "state",
            format!(
                "{holder} has the state file, and worker {pid} answers on worker_listen: two workers on one machine"
            ),
            "end one of them",
        ),
        None => Finding::warn(
            "state",
            format!("{holder} has the state file, and no worker answers on worker_listen"),
            "if it has not just been started, look at its log; a second worker does not start",
        ),
    })
}

pub(super) fn lists(facts: &Facts) -> Vec<Finding> {
    let (user, running) = (&facts.state.user, facts.running.as_ref());
    let is_damaged = |running: &RunningWorker, key: &str| running.lists_damaged.iter().any(|damaged| damaged == key);
    let check = |list: &ListFacts| match running {
        Some(running) => read_list(list, is_damaged(running, list.key)),
        None => unread_list(list, user),
    };
    facts.lists.iter().map(check).collect()
}

/// What the running worker says of a list, whoever it is.
fn read_list(ListFacts { key, path, .. }: &ListFacts, is_damaged: bool) -> Finding {
    let path = path.display();
    let damaged = is_damaged.then(|| {
        let found = format!("the running worker cannot read {path}, or it is damaged: what it last read counts");
        (found, "its log says why, with the line".to_owned())
    });
    Finding::judge(key, Level::Fail, format!("the running worker has read {path}"), damaged)
}

fn unread_list(ListFacts { key, path, access }: &ListFacts, user: &str) -> Finding {
    let (path, advice) = (path.display(), format!("let {user} read it (chmod, chown)"));
    match access {
        Access::Granted => Finding::ok(key, format!("{user} may read {path}")),
        Access::Creatable => {
            Finding::fail(key, format!("{path} is missing"), format!("write it, or take {key} out of the config"))
        }
        Access::OnlyFor(other) => {
            let advice = format!("start the worker as {other} (User= of its unit, or worker_user), or {advice}");
            Finding::warn(key, format!("{path} is readable for {other} and not for {user}"), advice)
        }
        Access::Denied(reason) => Finding::fail(key, format!("{user} cannot read {path}: {reason}"), advice),
    }
}
