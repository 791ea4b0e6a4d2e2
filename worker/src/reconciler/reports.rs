//! The reports that the reconciler publishes: the outcomes of keys, and the state of each domain.
//!
//! No task: the reconciler has a [`ReportSender`], which never waits, and the publisher [`Reports`]. Next stop of a
//! key: [`crate::bus`].

use std::collections::BTreeMap;
use std::net::IpAddr;

use prometheus::IntCounter;
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};
use wgkex_common::runtime::metrics::set;
use wgkex_common::wire::message::{Applied, Handshakes, Revoked};
use wgkex_common::wire::revoke_outcome::RevokeOutcome;
use wgkex_common::{Domain, PublicKey, RejectReason};
use wgkex_kernel::{Device, KernelError};

use super::Metrics;
use crate::peers::PeerCounts;

/// Keys in one confirmation at most: about 100 kB of JSON.
const KEYS_PER_MESSAGE: usize = 2_000;

/// Messages of each kind that wait at most for MQTT.
const WAITING_MESSAGES_MAX: usize = 256;

/// The state of every domain that was read so far.
pub type DomainStates = BTreeMap<Domain, DomainState>;

/// Whether routers can use a domain at this gateway, as last read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DomainState {
    /// They can, with these parameters.
    Up {
        /// The UDP port that WireGuard listens on.
        port: u16,
        /// The key of the interface.
        public_key: PublicKey,
        /// The first address on the interface.
        link_address: IpAddr,
        /// Peers with a handshake younger than [`Policy::connected`](crate::peers::Policy::connected).
        connected: u64,
    },
    /// They cannot.
    Down {
        /// The reason in a few words.
        reason: String,
    },
}

impl DomainState {
    fn of(domain: &Domain, device: &Device, connected: u64) -> Self {
        let lacks = |what: &str| Self::Down { reason: format!("interface {} has no {what}", domain.wireguard()) };
        match (device.public_key, device.link_address, device.listen_port) {
            (None, _, _) => lacks("private key"),
            (_, None, _) => lacks("address"),
            (_, _, 0) => lacks("listen port"),
            (Some(public_key), Some(link_address), port) => Self::Up { port, public_key, link_address, connected },
        }
    }
}

/// The outcome of each key of a batch: installed, or the reason why not.
pub(super) type Report = Vec<(PublicKey, Result<(), RejectReason>)>;

/// The reason why keys are not installed after this error of the kernel.
pub(super) fn reject_reason(error: &KernelError) -> RejectReason {
    match error {
        KernelError::Interface { .. } => RejectReason::Interface,
        KernelError::Interrupted { .. } => RejectReason::Interrupted,
        KernelError::Refused { .. } => RejectReason::Kernel,
    }
}

/// The outcome of a key that a record denied.
pub(super) struct RevokedKey {
    /// When the record was made.
    pub at: u64,
    pub key: PublicKey,
    pub outcome: RevokeOutcome,
}

/// The publisher's end of the queues of reports.
pub struct Reports {
    /// The outcomes of keys that arrived.
    pub applied: mpsc::Receiver<Applied>,
    /// Keys with handshakes.
    pub handshakes: mpsc::Receiver<Handshakes>,
    /// The outcomes of denied keys.
    pub revoked: mpsc::Receiver<Revoked>,
    /// How many messages were dropped because the queue to MQTT was full.
    pub dropped: IntCounter,
}

pub(super) struct ReportSender {
    applied: mpsc::Sender<Applied>,
    handshakes: mpsc::Sender<Handshakes>,
    revoked: mpsc::Sender<Revoked>,
    state: watch::Sender<DomainStates>,
    metrics: Metrics,
}

impl ReportSender {
    pub fn new(state: watch::Sender<DomainStates>, metrics: Metrics) -> (Self, Reports) {
        let (applied, applied_receiver) = mpsc::channel(WAITING_MESSAGES_MAX);
        let (handshakes, handshakes_receiver) = mpsc::channel(WAITING_MESSAGES_MAX);
        let (revoked, revoked_receiver) = mpsc::channel(WAITING_MESSAGES_MAX);
        let reports = Reports {
            applied: applied_receiver,
            handshakes: handshakes_receiver,
            revoked: revoked_receiver,
            dropped: metrics.confirmations_dropped.clone(),
        };
        (Self { applied, handshakes, revoked, state, metrics }, reports)
    }

    /// Publishes the outcomes of a batch. Messages for a full queue are dropped: the routers send their keys again.
    pub fn confirm(&self, domain: &Domain, report: &Report) {
        for part in report.chunks(KEYS_PER_MESSAGE) {
            if self.applied.try_send(applied(domain, part)).is_err() {
                self.metrics.confirmations_dropped.inc();
            }
        }
    }

    /// Reports keys that have handshakes; false if the queue was full.
    pub fn report(&self, domain: &Domain, keys: &[PublicKey]) -> bool {
        let message = |part: &[PublicKey]| Handshakes { domain: domain.name().to_owned(), keys: part.to_vec() };
        keys.chunks(KEYS_PER_MESSAGE).all(|part| self.handshakes.try_send(message(part)).is_ok())
    }

    /// Reports the outcomes of denied keys. Messages for a full queue are dropped.
    pub(super) fn revoked(&self, keys: impl IntoIterator<Item = RevokedKey>) {
        let mut by_record = BTreeMap::<u64, BTreeMap<PublicKey, RevokeOutcome>>::new();
        for RevokedKey { at, key, outcome } in keys {
            by_record.entry(at).or_default().insert(key, outcome);
        }
        for (at, keys) in by_record {
            if self.revoked.try_send(Revoked { at, keys }).is_err() {
                self.metrics.confirmations_dropped.inc();
            }
        }
    }

    pub fn set_tables(&mut self, domain: &Domain, device: &Device, counts: PeerCounts) {
        self.metrics.peers.set_counts(domain, counts);
        self.set_state(domain, DomainState::of(domain, device, counts.connected));
    }

    pub fn set_lost(&mut self, domain: &Domain, error: &KernelError) {
        self.metrics.peers.set_counts(domain, PeerCounts::default());
        self.set_state(domain, DomainState::Down { reason: error.to_string() });
    }

    /// Logs transitions of a domain between up and down, each once.
    fn set_state(&mut self, domain: &Domain, state: DomainState) {
        let up = matches!(state, DomainState::Up { .. });
        self.metrics.domain_up.with_label_values(&[domain.name()]).set(i64::from(up));
        self.state.send_if_modified(|states| {
            let before = states.get(domain);
            if before == Some(&state) {
                return false;
            }
            let was_up = matches!(before, Some(DomainState::Up { .. }));
            match &state {
                DomainState::Down { reason } => warn!(%domain, reason, "domain is down"),
                DomainState::Up { .. } if !was_up => info!(%domain, "domain is up"),
                DomainState::Up { .. } => {}
            }
            states.insert(domain.clone(), state);
            true
        });
    }

    pub fn set_queue(&self, length: usize) {
        set(&self.metrics.queue_length, length);
    }
}

fn applied(domain: &Domain, report: &[(PublicKey, Result<(), RejectReason>)]) -> Applied {
    let installed = report.iter().filter(|(_, outcome)| outcome.is_ok()).map(|(key, _)| *key).collect();
    let failed = report.iter().filter_map(|(key, outcome)| Some((*key, outcome.clone().err()?))).collect();
    Applied { domain: domain.name().to_owned(), installed, failed }
}
