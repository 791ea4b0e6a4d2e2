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
    let damaged = |key: &str| {
        facts.running.as_ref().is_some_and(|running| running.lists_damaged.iter().any(|damaged| damaged == key))
    };
    facts.lists.iter().map(|list| self::list(list, &facts.state.user, damaged(list.key))).collect()
}

fn list(ListFacts { key, path, access }: &ListFacts, user: &str, is_damaged: bool) -> Finding {
    let path = path.display();
    let trouble = match access {
        Access::Granted if is_damaged => Some((
            format!("{path} is damaged: the running worker uses what it last read"),
            "its log has the line".to_owned(),
        )),
        Access::Granted => None,
        Access::Creatable => Some((format!("{path} is missing"), format!("write it, or take {key} out of the config"))),
        Access::OnlyFor(other) => Some((
            format!("{path} is readable for {other} and not for {user}"),
            format!("let {user} read it (chmod, chown)"),
        )),
        Access::Denied(reason) => {
            Some((format!("{user} cannot read {path}: {reason}"), format!("let {user} read it (chmod, chown)")))
        }
    };
    Finding::judge(key, Level::Fail, format!("{user} may read {path}"), trouble)
}
