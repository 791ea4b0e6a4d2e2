//! Revocations of keys that wait for the result at each gateway. No task: an admin call waits, and the bus room brings the
//! results.
//!
//! The previous stop of a result is [`crate::bus`], the next one the admin call in [`crate::http`].

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use wgkex_common::wire::message::Revoked;
use wgkex_common::{PublicKey, WorkerName};

use crate::fleet::gateways::Reachability;

/// How long an admin call waits for all gateways together.
pub const TIMEOUT: Duration = Duration::from_secs(2);
/// The most gateways whose results one call gets: more than any fleet has.
const MAX_GATEWAYS: usize = 4096;
/// The longest reason of a gateway that is shown, in characters.
const SHOWN_MAX: usize = 80;

/// A record of the access lists that denies a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct DenyRecord {
    key: PublicKey,
    /// When it was made.
    at: u64,
}

/// The result at one gateway.
#[derive(Debug)]
struct GatewayResult {
    worker: WorkerName,
    outcome: String,
}

/// The revocations that wait for results. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct PendingRevocations {
    calls: Arc<Mutex<HashMap<DenyRecord, Call>>>,
}

/// Where the results of one revocation go, and which gateways have sent one: the first of each counts.
#[derive(Debug)]
struct Call {
    results: mpsc::Sender<GatewayResult>,
    received: BTreeSet<WorkerName>,
}

/// A revocation that waits for results. Dropped, it ends.
#[derive(Debug)]
pub struct PendingRevocation {
    pending: PendingRevocations,
    record: DenyRecord,
    results: mpsc::Receiver<GatewayResult>,
}

/// The result at a gateway, as the admin call shows it: the key was in the kernel and is removed.
pub const REMOVED: &str = "removed";
/// The key was not in the kernel.
pub const ABSENT: &str = "was not there";
/// The gateway applies the record when it is back, before it installs keys.
pub const OFFLINE: &str = "offline";
/// The gateway is an original, or an old version of ours.
pub const UNSUPPORTED: &str = "cannot";
/// The gateway sent no result in time.
pub const TIMED_OUT: &str = "no answer";

/// Whether a gateway with this result is known not to have the key.
#[must_use]
pub fn is_done(result: &str) -> bool {
    result == REMOVED || result == ABSENT
}

impl PendingRevocations {
    /// Waits for results of the record that denies `key` since `at`.
    #[must_use]
    pub fn begin(&self, key: PublicKey, at: u64) -> PendingRevocation {
        let (sender, results) = mpsc::channel(MAX_GATEWAYS);
        let record = DenyRecord { key, at };
        self.calls().insert(record, Call { results: sender, received: BTreeSet::new() });
        PendingRevocation { pending: self.clone(), record, results }
    }

    /// Passes on the results of `worker`. When it applies records on its return, no call waits for that.
    pub fn on_revoked(&self, worker: &WorkerName, revoked: Revoked) {
        let mut calls = self.calls();
        for (key, outcome) in revoked.keys {
            if let Some(call) = calls.get_mut(&DenyRecord { key, at: revoked.at })
                && call.received.len() < MAX_GATEWAYS
                && call.received.insert(worker.clone())
            {
                let _ = call.results.try_send(GatewayResult { worker: worker.clone(), outcome });
            }
        }
    }

    fn calls(&self) -> MutexGuard<'_, HashMap<DenyRecord, Call>> {
        self.calls.lock()
    }
}

impl PendingRevocation {
    /// The result at each gateway, by their `reachability`: as soon as all that are online have sent one, and no later than
    /// `until`.
    pub async fn results(
        mut self,
        reachability: BTreeMap<WorkerName, Reachability>,
        until: Instant,
    ) -> BTreeMap<WorkerName, String> {
        let online = reachability.iter().filter(|(_, reachability)| **reachability == Reachability::Online);
        let mut missing: BTreeSet<WorkerName> = online.map(|(name, _)| name.clone()).collect();
        let mut results: BTreeMap<WorkerName, String> = reachability
            .into_iter()
            .map(|(name, reachability)| (name, without_result(reachability).to_owned()))
            .collect();
        while !missing.is_empty() {
            let Ok(Some(GatewayResult { worker, outcome })) = timeout_at(until, self.results.recv()).await else {
                break;
            };
            if missing.remove(&worker) {
                results.insert(worker, shown(&outcome));
            }
        }
        results
    }
}

impl Drop for PendingRevocation {
    fn drop(&mut self) {
        self.pending.calls().remove(&self.record);
    }
}

fn without_result(reachability: Reachability) -> &'static str {
    match reachability {
        Reachability::Online => TIMED_OUT,
        Reachability::Offline => OFFLINE,
        Reachability::Unsupported => UNSUPPORTED,
    }
}

fn shown(outcome: &str) -> String {
    match outcome {
        Revoked::REMOVED => REMOVED.into(),
        Revoked::ABSENT => ABSENT.into(),
        reason => {
            let reason: String = reason.chars().filter(|c| !c.is_control()).take(SHOWN_MAX).collect();
            format!("failed: {reason}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> WorkerName {
        name.parse().unwrap()
    }

    fn key(n: u8) -> PublicKey {
        PublicKey::from_bytes([n; 32]).unwrap()
    }

    fn revoked(at: u64, n: u8, outcome: &str) -> Revoked {
        Revoked { at, keys: [(key(n), outcome.to_owned())].into() }
    }

    fn reach() -> BTreeMap<WorkerName, Reachability> {
        let reach = [
            ("gw1", Reachability::Online),
            ("gw2", Reachability::Online),
            ("gw3", Reachability::Offline),
            ("gw4", Reachability::Unsupported),
        ];
        reach.map(|(worker, reach)| (name(worker), reach)).into()
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_result_of_each_gateway_for_this_record_counts() {
        let pending = PendingRevocations::default();
        let waiting = pending.begin(key(3), 7);
        for (worker, revoked) in [
            ("gw1", revoked(6, 3, "removed")),
            ("gw1", revoked(7, 4, "removed")),
            ("stranger", revoked(7, 3, "removed")),
            ("gw3", revoked(7, 3, "removed")),
            ("gw1", revoked(7, 3, "absent")),
            ("gw1", revoked(7, 3, "removed")),
            ("gw2", revoked(7, 3, "x\ny")),
        ] {
            pending.on_revoked(&name(worker), revoked);
        }
        let begun = Instant::now();
        let results = waiting.results(reach(), begun + TIMEOUT).await;
        let wanted = [("gw1", ABSENT), ("gw2", "failed: xy"), ("gw3", OFFLINE), ("gw4", UNSUPPORTED)];
        assert_eq!(results, wanted.map(|(worker, result)| (name(worker), result.to_owned())).into());
        assert_eq!(begun.elapsed(), Duration::ZERO, "nobody is waited for in vain");
        assert!(pending.calls().is_empty());
    }

    /// Fails where every word is queued: there was no place for the other gateway's.
    #[tokio::test(start_paused = true)]
    async fn a_worker_with_many_outcomes_crowds_out_no_other() {
        let pending = PendingRevocations::default();
        let waiting = pending.begin(key(3), 7);
        for _ in 0..2 * MAX_GATEWAYS {
            pending.on_revoked(&name("gw1"), revoked(7, 3, "failed"));
        }
        pending.on_revoked(&name("gw2"), revoked(7, 3, "removed"));
        let results = waiting.results(reach(), Instant::now() + TIMEOUT).await;
        assert_eq!((results["gw1"].as_str(), results["gw2"].as_str()), ("failed: failed", REMOVED));
    }

    #[tokio::test(start_paused = true)]
    async fn a_gateway_without_a_result_is_awaited_until_the_timeout() {
        let pending = PendingRevocations::default();
        let waiting = pending.begin(key(3), 7);
        pending.on_revoked(&name("gw2"), revoked(7, 3, "removed"));
        let begun = Instant::now();
        let results = waiting.results(reach(), begun + TIMEOUT).await;
        assert_eq!((results["gw1"].as_str(), results["gw2"].as_str()), (TIMED_OUT, REMOVED));
        assert_eq!(begun.elapsed(), TIMEOUT);
        assert!(
            is_done(REMOVED)
                && is_done(ABSENT)
                && ![TIMED_OUT, OFFLINE, UNSUPPORTED, "failed: x"].map(is_done).contains(&true)
        );
    }
}
