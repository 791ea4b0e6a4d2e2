//! Revocations of keys that wait for the result at each gateway. No task: an admin call waits, and the bus room brings the
//! results.
//!
//! The previous stop of a result is [`crate::bus`], the next one the admin call in [`crate::http`].

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use serde::Serialize;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use wgkex_common::wire::message::Revoked;
use wgkex_common::wire::revoke_outcome::RevokeOutcome;
use wgkex_common::{PublicKey, RejectReason, WorkerName};

use crate::fleet::gateways::Reachability;

/// How long an admin call waits for all gateways together.
pub const REVOCATION_TIMEOUT: Duration = Duration::from_secs(2);
/// The most gateways whose results one call gets: more than any fleet has.
const RESULTS_MAX: usize = 4096;

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
    outcome: RevokeOutcome,
}

/// The revocations that wait for results. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct PendingRevocations {
    calls: Arc<Mutex<HashMap<DenyRecord, RevocationCall>>>,
}

/// Where the results of one revocation go, and which gateways have sent one: the first of each counts.
#[derive(Debug)]
struct RevocationCall {
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

/// The text of [`GatewayOutcome::Offline`].
pub const OFFLINE: &str = "offline";
/// The text of [`GatewayOutcome::Unsupported`].
pub const UNSUPPORTED: &str = "cannot";

/// The outcome at a gateway. The admin call shows its text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(into = "String")]
pub enum GatewayOutcome {
    /// The key was in the kernel and is removed.
    Removed,
    /// The key was not in the kernel.
    Absent,
    /// The key is still in the kernel, for this reason.
    Failed(RejectReason),
    /// The gateway applies the record when it is back, before it installs keys.
    Offline,
    /// The gateway is an original, or an old version of ours.
    Unsupported,
    /// The gateway sent no result in time.
    TimedOut,
}

impl PendingRevocations {
    /// Waits for results of the record that denies `key` since `at`.
    #[must_use]
    pub fn begin(&self, key: PublicKey, at: u64) -> PendingRevocation {
        let (sender, results) = mpsc::channel(RESULTS_MAX);
        let record = DenyRecord { key, at };
        self.calls().insert(record, RevocationCall { results: sender, received: BTreeSet::new() });
        PendingRevocation { pending: self.clone(), record, results }
    }

    /// Passes on the results of `worker`. When it applies records on its return, no call waits for that.
    pub fn on_revoked(&self, worker: &WorkerName, revoked: Revoked) {
        let mut calls = self.calls();
        for (key, outcome) in revoked.keys {
            if let Some(call) = calls.get_mut(&DenyRecord { key, at: revoked.at })
                && call.received.len() < RESULTS_MAX
                && call.received.insert(worker.clone())
            {
                let _ = call.results.try_send(GatewayResult { worker: worker.clone(), outcome });
            }
        }
    }

    fn calls(&self) -> MutexGuard<'_, HashMap<DenyRecord, RevocationCall>> {
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
    ) -> BTreeMap<WorkerName, GatewayOutcome> {
        let online = reachability.iter().filter(|(_, reachability)| **reachability == Reachability::Online);
        let mut missing: BTreeSet<WorkerName> = online.map(|(name, _)| name.clone()).collect();
        let mut results: BTreeMap<WorkerName, GatewayOutcome> =
            reachability.into_iter().map(|(name, reachability)| (name, without_result(reachability))).collect();
        while !missing.is_empty()
            && let Ok(Some(GatewayResult { worker, outcome })) = timeout_at(until, self.results.recv()).await
        {
            if missing.remove(&worker) {
                results.insert(worker, outcome.into());
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

fn without_result(reachability: Reachability) -> GatewayOutcome {
    match reachability {
        Reachability::Online => GatewayOutcome::TimedOut,
        Reachability::Offline => GatewayOutcome::Offline,
        Reachability::Unsupported => GatewayOutcome::Unsupported,
    }
}

impl GatewayOutcome {
    /// Whether a gateway with this outcome is known not to have the key.
    #[must_use]
    pub fn is_done(&self) -> bool {
        matches!(self, Self::Removed | Self::Absent)
    }
}

impl From<RevokeOutcome> for GatewayOutcome {
    fn from(outcome: RevokeOutcome) -> Self {
        match outcome {
            RevokeOutcome::Removed => Self::Removed,
            RevokeOutcome::Absent => Self::Absent,
            RevokeOutcome::Failed(reason) => Self::Failed(reason),
        }
    }
}

impl From<GatewayOutcome> for String {
    fn from(outcome: GatewayOutcome) -> Self {
        match outcome {
            GatewayOutcome::Removed => "removed".into(),
            GatewayOutcome::Absent => "was not there".into(),
            GatewayOutcome::Offline => OFFLINE.into(),
            GatewayOutcome::Unsupported => UNSUPPORTED.into(),
            GatewayOutcome::TimedOut => "no answer".into(),
            GatewayOutcome::Failed(reason) => {
                format!("failed: {}", reason.to_string().replace(|c: char| c.is_control(), ""))
            }
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
        Revoked { at, keys: [(key(n), outcome.to_owned().into())].into() }
    }

    fn texts(results: BTreeMap<WorkerName, GatewayOutcome>) -> BTreeMap<String, String> {
        results.into_iter().map(|(worker, outcome)| (worker.to_string(), outcome.into())).collect()
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
        let results = waiting.results(reach(), begun + REVOCATION_TIMEOUT).await;
        let wanted = [("gw1", "was not there"), ("gw2", "failed: xy"), ("gw3", "offline"), ("gw4", "cannot")];
        assert_eq!(texts(results), wanted.map(|(worker, text)| (worker.to_owned(), text.to_owned())).into());
        assert_eq!(begun.elapsed(), Duration::ZERO, "nobody is waited for in vain");
        assert!(pending.calls().is_empty());
    }

    /// Fails if every result is queued: there was no room for that of the other gateway.
    #[tokio::test(start_paused = true)]
    async fn a_worker_with_many_outcomes_crowds_out_no_other() {
        let pending = PendingRevocations::default();
        let waiting = pending.begin(key(3), 7);
        for _ in 0..2 * RESULTS_MAX {
            pending.on_revoked(&name("gw1"), revoked(7, 3, "failed"));
        }
        pending.on_revoked(&name("gw2"), revoked(7, 3, "removed"));
        let results = waiting.results(reach(), Instant::now() + REVOCATION_TIMEOUT).await;
        let failed = GatewayOutcome::Failed(RejectReason::Other("failed".into()));
        assert_eq!((&results["gw1"], &results["gw2"]), (&failed, &GatewayOutcome::Removed));
    }

    #[tokio::test(start_paused = true)]
    async fn a_gateway_without_a_result_is_awaited_until_the_timeout() {
        let pending = PendingRevocations::default();
        let waiting = pending.begin(key(3), 7);
        pending.on_revoked(&name("gw2"), revoked(7, 3, "removed"));
        let begun = Instant::now();
        let results = waiting.results(reach(), begun + REVOCATION_TIMEOUT).await;
        assert_eq!((&results["gw1"], &results["gw2"]), (&GatewayOutcome::TimedOut, &GatewayOutcome::Removed));
        assert_eq!(begun.elapsed(), REVOCATION_TIMEOUT);
        let failed = GatewayOutcome::Failed(RejectReason::Kernel);
        let not_done = [GatewayOutcome::TimedOut, GatewayOutcome::Offline, GatewayOutcome::Unsupported, failed];
        assert!(GatewayOutcome::Removed.is_done() && GatewayOutcome::Absent.is_done());
        assert!(!not_done.iter().any(GatewayOutcome::is_done));
    }
}
