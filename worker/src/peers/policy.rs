//! When peers are stale, how many there may be, and in which state one is.

use std::time::Duration;

use wgkex_common::Config;
use wgkex_common::address::claim::handshake_report_interval;
use wgkex_common::config::{Cleanup, Peers};

/// When peers are stale, and how often that is looked for (contract sections 4 and 7).
#[derive(Debug, Clone, Copy)]
pub struct Policy {
    /// A peer is stale without a handshake for this long.
    pub stale: Duration,
    /// It is not stale this long after its key came, or was found in the kernel, or was put back into it.
    pub grace: Duration,
    /// Stale peers are looked for this often.
    pub interval: Duration,
    /// A peer is connected if its last handshake is younger than this.
    pub connected: Duration,
    /// Tables are read, peers counted, and what is missing is restored, this often.
    pub count: Duration,
    /// The handshakes of a peer are reported again after this long.
    pub report: Duration,
    /// So many keys are pending at most; the oldest go first.
    pub pending: usize,
    /// So many peers that never had a handshake an interface has at most; the oldest go first.
    pub unestablished: usize,
    /// A peer that was silent for this long forgets where its router was; none never do.
    pub forget: Option<Duration>,
    /// So many peers of any kind an interface has at most; no new one is set beyond.
    pub peers: usize,
}

impl Policy {
    /// How long a handshake at another gateway counts: what has a handshake there is reported every so often.
    pub(super) fn established_elsewhere(&self) -> Duration {
        self.report + self.stale
    }
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            stale: Duration::from_secs(10_800),
            grace: Duration::from_secs(600),
            interval: Duration::from_secs(3_600),
            connected: Duration::from_secs(180),
            // What vanished is to be back within a minute, and takes seconds with very many peers.
            count: Duration::from_secs(45),
            report: Duration::from_secs(21_600),
            pending: 200_000,
            forget: None,
            unestablished: 30_000,
            peers: 100_000,
        }
    }
}

impl From<&Config> for Policy {
    fn from(config: &Config) -> Self {
        let Cleanup { interval, stale, grace } = config.cleanup;
        let Peers { max: peers, unproven: unestablished } = config.peers;
        let report = handshake_report_interval(config.live_keys.ttl, stale);
        let forget = config.forget_idle_after;
        Self { stale, grace, interval, report, unestablished, forget, peers, ..Self::default() }
    }
}

/// What a peer does. Every peer is in one of these states, also those that wgkex did not make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum PeerState {
    /// It had a handshake in the last [`Policy::connected`].
    Connected,
    /// It had a handshake, longer ago than that, but within [`Policy::stale`].
    Idle,
    /// It did not, but is within its grace.
    New,
    /// It did not, and its grace is over: if wgkex made it, the next sweep takes it.
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
