//! Logs which gateways come online and go offline: a bounded number of lines for each, the last of which is correct.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use tracing::{info, warn};
use wgkex_common::WorkerName;
use wgkex_common::runtime::line_budget::LineBudget;

use crate::bus::LOGGED_GATEWAYS_MAX;
use crate::fleet::status::Offline;

/// Logs whether gateways are online; changes beyond the [`LineBudget`] are logged as one, when its period is over.
/// Clones share everything.
#[derive(Debug, Clone, Default)]
pub struct OnlineLog(Arc<Mutex<GatewayLogs>>);

#[derive(Debug, Default)]
struct GatewayLogs(BTreeMap<WorkerName, GatewayLog>);

/// The logged state of a gateway.
#[derive(Debug)]
struct GatewayLog {
    state: LoggedState,
    /// Whether the last line reports it as online; none before the first line.
    logged: Option<bool>,
    budget: LineBudget,
}

/// Whether a gateway is online.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LoggedState {
    /// It is.
    Online,
    /// It is not, for this reason.
    Offline(Offline),
}

impl LoggedState {
    /// None if it is online.
    #[must_use]
    pub fn of(offline: Option<Offline>) -> Self {
        offline.map_or(Self::Online, Self::Offline)
    }

    fn is_online(&self) -> bool {
        *self == Self::Online
    }
}

impl OnlineLog {
    /// A gateway came online or went offline.
    pub fn on_change(&self, worker: &WorkerName, state: &LoggedState, now: Instant) {
        if self.0.lock().is_line_due(worker, state, now) {
            log(worker, state);
        }
    }

    /// A gateway published nothing for too long. This takes so long that the number of lines needs no bound.
    pub fn on_expired(&self, worker: &WorkerName, offline: Offline) {
        warn!(
            worker = worker.as_str(),
            online = false,
            reason = %offline.reason,
            "gateway published nothing for too long, it counts as offline"
        );
        if let Some(gateway) = self.0.lock().0.get_mut(worker) {
            (gateway.state, gateway.logged) = (LoggedState::Offline(offline), Some(false));
        }
    }

    /// Logs the states of gateways that changed too often, once their periods are over.
    pub fn on_due(&self, now: Instant) {
        for (worker, state) in self.0.lock().take_due(now) {
            log(&worker, &state);
        }
    }
}

fn log(worker: &WorkerName, state: &LoggedState) {
    let (worker, online) = (worker.as_str(), state.is_online());
    match state {
        LoggedState::Online => info!(worker, online, "gateway is online"),
        LoggedState::Offline(Offline { reason, .. }) => info!(worker, online, %reason, "gateway is offline"),
    }
}

impl GatewayLogs {
    fn is_line_due(&mut self, worker: &WorkerName, state: &LoggedState, now: Instant) -> bool {
        if self.0.len() >= LOGGED_GATEWAYS_MAX && !self.0.contains_key(worker) {
            return false;
        }
        let new = || GatewayLog { state: state.clone(), logged: None, budget: LineBudget::new(now) };
        let gateway = self.0.entry(worker.clone()).or_insert_with(new);
        gateway.budget.renew(now);
        gateway.state = state.clone();
        let is_due = !gateway.budget.is_spent();
        if is_due {
            gateway.logged = Some(state.is_online());
            gateway.budget.spend();
        }
        is_due
    }

    /// The states that are not in the log, of gateways whose periods are over. Drops gateways whose period is over and
    /// whose state is logged.
    fn take_due(&mut self, now: Instant) -> Vec<(WorkerName, LoggedState)> {
        let mut due = Vec::new();
        self.0.retain(|worker, gateway| {
            let is_over = gateway.budget.is_over(now);
            let is_online = gateway.state.is_online();
            if is_over && gateway.logged != Some(is_online) {
                due.push((worker.clone(), gateway.state.clone()));
                gateway.logged = Some(is_online);
                gateway.budget.renew(now);
                gateway.budget.spend();
                return true;
            }
            !is_over
        });
        due
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::fleet::status::OfflineReason;

    fn name(name: &str) -> WorkerName {
        name.parse().unwrap()
    }

    fn state(is_online: bool) -> LoggedState {
        let stopped = Offline { reason: OfflineReason::Stopped, for_secs: Some(0) };
        LoggedState::of((!is_online).then_some(stopped))
    }

    #[test]
    fn a_gateway_that_changes_all_the_time_has_few_lines_and_the_last_is_right() {
        let (mut log, begun) = (GatewayLogs::default(), Instant::now());
        let at = |seconds| begun + Duration::from_secs(seconds);
        for last in [true, false] {
            let flips = (0..10_001).map(|n| (n % 2 == 0) == last);
            assert_eq!(flips.filter(|online| log.is_line_due(&name("gw"), &state(*online), at(0))).count(), 10);
            assert!(log.is_line_due(&name(&format!("other-{last}")), &state(true), at(0)), "each has its own bound");
            assert_eq!(log.take_due(at(59)), []);
            assert_eq!(log.take_due(at(60)), [(name("gw"), state(last))]);
            assert_eq!((log.take_due(at(61)), log.0.len()), (Vec::new(), 1));
            assert_eq!((log.take_due(at(120)), log.0.len()), (Vec::new(), 0), "what is logged is forgotten");
        }
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let (mut log, now) = (GatewayLogs::default(), Instant::now());
        let lines = (0..2 * LOGGED_GATEWAYS_MAX)
            .filter(|n| log.is_line_due(&name(&n.to_string()), &LoggedState::Online, now))
            .count();
        assert_eq!((lines, log.0.len()), (LOGGED_GATEWAYS_MAX, LOGGED_GATEWAYS_MAX));
    }
}
