//! Which gateways come online and go offline, in the log: a bounded number of lines about each, of which the last is right.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use tracing::{info, warn};
use wgkex_common::WorkerName;

use crate::bus::line_budget::{LineBudget, MAX_LOGGED_GATEWAYS};

/// Logs whether gateways are online; what changes beyond the [`LineBudget`] once, when its period is over. Clones share
/// everything.
#[derive(Debug, Clone, Default)]
pub struct OnlineLog(Arc<Mutex<GatewayLogs>>);

#[derive(Debug, Default)]
struct GatewayLogs(BTreeMap<WorkerName, GatewayLog>);

/// What was logged of a gateway.
#[derive(Debug)]
struct GatewayLog {
    is_online: bool,
    /// The state in the last line; none before the first.
    logged: Option<bool>,
    budget: LineBudget,
}

impl OnlineLog {
    /// A gateway came online or went offline.
    pub fn on_change(&self, worker: &WorkerName, online: bool, now: Instant) {
        if self.0.lock().is_line_due(worker, online, now) {
            log(worker, online);
        }
    }

    /// A gateway published nothing for too long. That takes so long that the lines need no bound.
    pub fn on_expired(&self, worker: &WorkerName) {
        warn!(
            worker = worker.as_str(),
            online = false,
            "gateway published nothing for too long, it is taken for offline"
        );
        if let Some(gateway) = self.0.lock().0.get_mut(worker) {
            (gateway.is_online, gateway.logged) = (false, Some(false));
        }
    }

    /// Logs the states of gateways that changed too often, once their periods are over.
    pub fn on_due(&self, now: Instant) {
        for (worker, online) in self.0.lock().take_due(now) {
            log(&worker, online);
        }
    }
}

fn log(worker: &WorkerName, online: bool) {
    let worker = worker.as_str();
    if online {
        info!(worker, online, "gateway is online");
    } else {
        info!(worker, online, "gateway is offline");
    }
}

impl GatewayLogs {
    fn is_line_due(&mut self, worker: &WorkerName, online: bool, now: Instant) -> bool {
        if self.0.len() >= MAX_LOGGED_GATEWAYS && !self.0.contains_key(worker) {
            return false;
        }
        let new = || GatewayLog { is_online: online, logged: None, budget: LineBudget::new(now) };
        let gateway = self.0.entry(worker.clone()).or_insert_with(new);
        gateway.budget.renew(now);
        gateway.is_online = online;
        let is_due = !gateway.budget.is_spent();
        if is_due {
            gateway.logged = Some(online);
            gateway.budget.spend();
        }
        is_due
    }

    /// The states that are not in the log, of gateways whose periods are over. What is over and logged is forgotten.
    fn take_due(&mut self, now: Instant) -> Vec<(WorkerName, bool)> {
        let mut due = Vec::new();
        self.0.retain(|worker, gateway| {
            let is_over = gateway.budget.is_over(now);
            if is_over && gateway.logged != Some(gateway.is_online) {
                due.push((worker.clone(), gateway.is_online));
                gateway.logged = Some(gateway.is_online);
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

    fn name(name: &str) -> WorkerName {
        name.parse().unwrap()
    }

    #[test]
    fn a_gateway_that_changes_all_the_time_has_few_lines_and_the_last_is_right() {
        let (mut log, begun) = (GatewayLogs::default(), Instant::now());
        let at = |seconds| begun + Duration::from_secs(seconds);
        for last in [true, false] {
            let flips = (0..10_001).map(|n| (n % 2 == 0) == last);
            assert_eq!(flips.filter(|online| log.is_line_due(&name("gw"), *online, at(0))).count(), 10);
            assert!(log.is_line_due(&name(&format!("other-{last}")), true, at(0)), "each has its own bound");
            assert_eq!(log.take_due(at(59)), []);
            assert_eq!(log.take_due(at(60)), [(name("gw"), last)]);
            assert_eq!((log.take_due(at(61)), log.0.len()), (Vec::new(), 1));
            assert_eq!((log.take_due(at(120)), log.0.len()), (Vec::new(), 0), "what is logged is forgotten");
        }
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let (mut log, now) = (GatewayLogs::default(), Instant::now());
        let lines = (0..2 * MAX_LOGGED_GATEWAYS).filter(|n| log.is_line_due(&name(&n.to_string()), true, now)).count();
        assert_eq!((lines, log.0.len()), (MAX_LOGGED_GATEWAYS, MAX_LOGGED_GATEWAYS));
    }
}
