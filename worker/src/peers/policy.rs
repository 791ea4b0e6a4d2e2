//! When peers are stale, how many there may be, and the states of peers.

use std::time::Duration;

use wgkex_common::Config;
use wgkex_common::address::claim::handshake_report_interval;
use wgkex_common::config::{Cleanup, PeerLimits};

/// When peers are stale, and how often they are swept (contract sections 4 and 7).
#[derive(Debug, Clone, Copy)]
pub struct Policy {
    /// A peer is stale without a handshake for this long.
    pub stale: Duration,
    /// For this long after its key arrived, or was found in the kernel, or was put back into it, a peer is not stale.
    pub grace: Duration,
    /// The interval of sweeps for stale peers.
    pub sweep_interval: Duration,
    /// A peer is connected if its last handshake is younger than this.
    pub connected: Duration,
    /// The interval in which tables are read, peers counted, and missing objects restored.
    pub read_interval: Duration,
    /// The handshakes of a peer are reported again after this long.
    pub report: Duration,
    /// The most pending keys; the oldest are dropped first.
    pub pending: usize,
    /// The most peers of an interface that never had a handshake; the oldest are evicted first.
    pub unestablished: usize,
    /// The endpoint of a peer that was silent for this long is forgotten; none means never.
    pub forget_endpoint_after: Option<Duration>,
    /// The most peers of an interface of any kind; no new one is set beyond that.
    pub peers: usize,
}

impl Policy {
    /// How long a handshake at another gateway counts: connected peers there are reported at intervals of
    /// [`Self::report`].
    pub(super) fn established_elsewhere(&self) -> Duration {
        self.report + self.stale
    }
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            stale: Duration::from_secs(10_800),
            grace: Duration::from_secs(600),
            sweep_interval: Duration::from_secs(3_600),
            connected: Duration::from_secs(180),
            // A vanished peer must be back within a minute, which includes the seconds that a read of very many peers
            // takes.
            read_interval: Duration::from_secs(45),
            report: Duration::from_secs(21_600),
            pending: 200_000,
            forget_endpoint_after: None,
            unestablished: 30_000,
            peers: 100_000,
        }
    }
}

impl From<&Config> for Policy {
    fn from(config: &Config) -> Self {
        let Cleanup { interval: sweep_interval, stale, grace } = config.cleanup;
        let PeerLimits { max: peers, unproven: unestablished } = config.peers;
        let report = handshake_report_interval(config.live_keys.ttl, stale);
        let forget_endpoint_after = config.forget_idle_after;
        Self { stale, grace, sweep_interval, report, unestablished, forget_endpoint_after, peers, ..Self::default() }
    }
}

/// The activity of a peer. Every peer is in one of these states, also those that wgkex did not make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum PeerState {
    /// It had a handshake in the last [`Policy::connected`].
    Connected,
    /// It had a handshake, longer ago than that, but within [`Policy::stale`].
    Idle,
    /// It had none within [`Policy::stale`], but is within its grace.
    New,
    /// It had none within [`Policy::stale`], and its grace is over: if wgkex made it, the next sweep removes it.
    Stale,
}

/// How many peers of an interface are in each state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PeerCounts {
    /// In [`PeerState::Connected`].
    pub connected: u64,
    /// In [`PeerState::Idle`].
    pub idle: u64,
    /// In [`PeerState::New`].
    pub new: u64,
    /// In [`PeerState::Stale`].
    pub stale: u64,
}
