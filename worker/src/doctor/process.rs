//! The worker's process on this machine: whether it runs, and the problems that it reports.

use wgkex_common::doctor::bus::SUBJECT;
use wgkex_common::doctor::sockets::PortOwner;
use wgkex_common::doctor::{CheckProblem, Finding, Level};

use super::facts::{DomainFacts, Facts, Listener, RunningWorker};

const WORKER_SUBJECT: &str = "worker";
/// The name of the worker's process.
const WORKER_PROGRAM: &str = "wgkex-worker";
const LISTEN: &str = "worker_listen";

/// Whether a worker runs and answers; none if another process has its state file, which has a check of its own.
pub(super) fn runs(Facts { listener, running, state, .. }: &Facts) -> Option<Finding> {
    let Listener { listen, owner, is_other_version } = listener;
    if running.is_some() {
        return Some(Finding::ok(WORKER_SUBJECT, format!("one runs here, and answers on {listen}")));
    }
    let holder = match owner {
        PortOwner::Nobody if matches!(state.holder, Ok(Some(_))) => return None,
        PortOwner::Nobody => {
            let found = "no worker runs here: what only a running one knows is not checked";
            return Some(Finding::warn(
                WORKER_SUBJECT,
                found,
                "`systemctl start wgkex-worker`; its log has the reason",
            ));
        }
        PortOwner::Process { pid, name } if name == WORKER_PROGRAM && *is_other_version => {
            let found =
                format!("process {pid} ({WORKER_PROGRAM}) has {listen}, and is of another version than this doctor");
            let advice = "`systemctl restart wgkex-worker`: what only a running worker knows is not checked";
            return Some(Finding::warn(WORKER_SUBJECT, found, advice));
        }
        PortOwner::Process { pid, name } if name == WORKER_PROGRAM => {
            let found = format!("process {pid} ({WORKER_PROGRAM}) has {listen}, and does not answer there");
            let advice = "look at its log (`journalctl -u wgkex-worker`), and `systemctl restart wgkex-worker`";
            return Some(Finding::fail(WORKER_SUBJECT, found, advice));
        }
        PortOwner::Process { pid, name } => format!("process {pid} ({})", name.escape_debug()),
        PortOwner::Kernel => "a process that is not seen from here".to_owned(),
    };
    let found = format!("{listen} is taken by {holder}, which does not answer as a worker");
    Some(Finding::fail(LISTEN, found, "end that, or set worker_listen to another port; if it is a worker, restart it"))
}

/// The worker's connection with the MQTT server; the doctor tests only a connection of its own.
pub(super) fn mqtt(running: &RunningWorker) -> Option<Finding> {
    let cause = running.mqtt_cause.as_ref()?;
    let found = format!("the running worker is not connected: {cause}");
    Some(Finding::fail(
        SUBJECT,
        found,
        "restart it if the config was changed since it started; else its log has the reason",
    ))
}

/// The state that the worker cannot keep on disk, by its own report.
pub(super) fn kept(RunningWorker { process, keeps_lists, .. }: &RunningWorker) -> Option<Finding> {
    let lost = match (process.keeps_state, keeps_lists) {
        (true, true) => return None,
        (false, true) => "keys",
        (true, false) => "list entries of admin calls",
        (false, false) => "keys and list entries of admin calls",
    };
    let found = format!("the running worker cannot keep {lost} on the disk: a restart would lose them");
    Some(Finding::warn("state", found, "see whether the disk is full or read-only; its log has the reason"))
}

/// Why the running worker cannot use a domain whose interfaces pass all checks: its user may have fewer rights than the
/// user of the doctor.
pub(super) fn domain_down(domain: &DomainFacts, running: Option<&RunningWorker>) -> Option<Finding> {
    let name = domain.domain.name();
    let (level, problem) = match running?.domains_down.get(name)? {
        None => {
            let found = "the running worker has not read its interfaces yet";
            (Level::Warn, CheckProblem::new(found, "look again in a moment, then at its log"))
        }
        Some(reason) => {
            let advice = "its log has the reason; it is another user than the doctor: run the doctor, and `wgkex-worker setup`, as the \
                          worker's user";
            (Level::Fail, CheckProblem::new(format!("the running worker cannot use it: {reason}"), advice))
        }
    };
    Some(Finding::judge(name, level, "", Some(problem)))
}
