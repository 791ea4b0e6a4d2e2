//! How long keys and peers are kept, and how many there may be: `cleanup`, `live_keys`, `peers`, `forget_idle_after`;
//! and how long a router waits for a peer: `confirm_timeout`, `confirm_budget`.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::diagnostics::{Diagnostics, Path};
use super::value::{Count, Seconds, seconds};

/// When silent peers are removed (contract section 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cleanup {
    /// The interval of sweeps for stale peers.
    pub interval: Duration,
    /// A peer without a handshake for this long is stale.
    pub stale: Duration,
    /// How long a new key has for its first handshake.
    pub grace: Duration,
}

/// The keys that the brokers remember, for gateways that lack them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LiveKeyLimits {
    /// So many at most; at least 1.
    pub max: usize,
    /// How long a key is kept after a router last sent it, or a gateway last reported a handshake.
    pub ttl: Duration,
}

/// How many peers a domain has at a gateway at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerLimits {
    /// In all, those included that other programs made; at least 1.
    pub max: usize,
    /// Of those that never had a handshake; at least 1.
    pub unproven: usize,
}

/// How long a router's answer may wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Confirm {
    /// For the confirmation of one gateway.
    pub timeout: Duration,
    /// For all gateways tried one after the other; at least `timeout`.
    pub budget: Duration,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct RawCleanup {
    pub interval: Option<Seconds>,
    pub parker_stale_timeout: Option<Seconds>,
    pub legacy_stale_timeout: Option<Seconds>,
    pub initial_handshake_grace: Option<Seconds>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct RawLiveKeys {
    pub max: Option<Count>,
    pub ttl: Option<Seconds>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct RawPeers {
    pub max: Option<Count>,
    pub unproven: Option<Count>,
}

impl RawCleanup {
    pub fn check(&self) -> Cleanup {
        Cleanup {
            interval: seconds(self.interval.as_ref(), 3600),
            stale: seconds(self.legacy_stale_timeout.as_ref(), 10800),
            grace: seconds(self.initial_handshake_grace.as_ref(), 600),
        }
    }
}

impl RawLiveKeys {
    pub fn check(&self) -> LiveKeyLimits {
        LiveKeyLimits { max: self.max.as_ref().map_or(200_000, |max| max.0), ttl: seconds(self.ttl.as_ref(), 86_400) }
    }
}

impl RawPeers {
    pub fn check(&self) -> PeerLimits {
        let count = |raw: &Option<Count>, default| raw.as_ref().map_or(default, |count| count.0);
        PeerLimits { max: count(&self.max, 100_000), unproven: count(&self.unproven, 30_000) }
    }
}

pub(super) fn forget_idle_after(raw: Option<&Seconds>, diagnostics: &mut Diagnostics) -> Option<Duration> {
    // WireGuard repeats a handshake after 120 s at the earliest, and rejects packets after 180 s (REJECT_AFTER_TIME).
    if raw.is_some_and(|after| after.0 < Duration::from_secs(180)) {
        diagnostics.warn(&Path::of("forget_idle_after"), "cuts tunnels that are in use, at least 180 is what is idle");
    }
    raw.map(|after| after.0)
}

pub(super) fn confirm(timeout: Option<&Seconds>, budget: Option<&Seconds>, diagnostics: &mut Diagnostics) -> Confirm {
    let confirm = Confirm { timeout: seconds(timeout, 1), budget: seconds(budget, 3) };
    if confirm.timeout > confirm.budget {
        let (timeout, budget) = (confirm.timeout.as_secs_f64(), confirm.budget.as_secs_f64());
        diagnostics.invalid(
            &Path::of("confirm_timeout"),
            &Value::from(timeout),
            &format!("must be at most {budget}, as confirm_budget is"),
        );
    }
    confirm
}
