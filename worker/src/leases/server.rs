//! The state of one server, of the registry or the hub of tenants: its leases, which of its peers wgkex made, and when
//! to ask a broker. Pure: events and the time are passed in.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use wgkex_common::PublicKey;
use wgkex_common::config::Config;
use wgkex_common::wire::lease::{HUB, LeaseMessage};
use wgkex_kernel::{Device, Interface};

use super::file::StoredServer;
use super::plan::{LeasePlan, WantedLeases, plan};
use super::source::{Announced, LeaseSource};
use super::table::{LeaseProgress, LeaseTable};

/// How long a broker may take to answer before another one is asked.
const LEASES_ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// How often to request all leases, in case a change was missed.
const FULL_INTERVAL: Duration = Duration::from_secs(3600);
/// How long to wait for a missing change before a broker is asked.
const MISSING_CHANGE_WAIT: Duration = Duration::from_secs(1);
/// After this time without a message of the coordinator of tenants another one is accepted: it publishes its version
/// every 10 s.
const COORDINATOR_SILENCE_TIMEOUT: Duration = Duration::from_secs(15);
/// The shortest time between two checks of the forwarding; shorter than [`PEERS_CHECK_INTERVAL`], so that each regular check
/// includes it.
const FORWARDING_CHECK_INTERVAL: Duration = Duration::from_secs(30);
/// How often the peers are compared with the leases.
const PEERS_CHECK_INTERVAL: Duration = Duration::from_secs(60);

pub(super) struct ServerState {
    pub name: String,
    pub source: LeaseSource,
    pub interface: Interface,
    pub table: LeaseTable,
    /// The description that is published for brokers, once the interface was read.
    pub announced: Option<Announced>,
    made: BTreeSet<PublicKey>,
    foreign: BTreeSet<PublicKey>,
    /// When the last message of the coordinator with the current version id was received.
    last_received: Option<Instant>,
    /// The state differs from that on disk.
    is_unsaved: bool,
    ask_at: Instant,
    check_at: Instant,
    /// The earliest time of the next check of the forwarding: not with each lease that changes.
    forwarding_check_at: Instant,
    /// The last change of the peers failed, and that is logged.
    pub is_failing: bool,
}

/// The servers of the config, by name, and the hub.
pub(super) fn sources(config: &Config) -> Vec<(String, LeaseSource)> {
    let servers = config.servers.iter().map(|(name, server)| (name.clone(), LeaseSource::Registry(server.clone())));
    servers.chain(config.hub.iter().map(|hub| (HUB.to_owned(), LeaseSource::Tenants(hub.clone())))).collect()
}

impl ServerState {
    pub fn new(name: String, source: LeaseSource, stored: StoredServer, now: Instant) -> Self {
        let StoredServer { version, leases, removed, foreign } = stored;
        let made = leases.keys().filter(|key| !foreign.contains(key)).chain(&removed).copied().collect();
        Self {
            name,
            interface: Interface { name: source.interface().to_owned(), vxlan: None },
            source,
            table: LeaseTable::restored(version, leases),
            announced: None,
            made,
            foreign,
            last_received: None,
            // The file must name the server even without leases, so that its removal from the config is detected.
            is_unsaved: true,
            ask_at: now,
            check_at: now,
            forwarding_check_at: now,
            is_failing: false,
        }
    }

    /// The state to be stored.
    pub fn stored(&self) -> StoredServer {
        let leases = self.table.leases();
        StoredServer {
            version: self.table.version(),
            leases: leases.clone(),
            removed: self.made.iter().filter(|key| !leases.contains_key(key)).copied().collect(),
            foreign: self.foreign.clone(),
        }
    }

    /// Whether the state has to be stored.
    pub fn is_unsaved(&self) -> bool {
        self.is_unsaved
    }

    /// The state is stored.
    pub fn saved(&mut self) {
        self.is_unsaved = false;
    }

    /// Applies a broker's message.
    pub fn on_message(&mut self, message: LeaseMessage, now: Instant) {
        let before = self.table.version();
        if self.is_of_other_coordinator(&message, now) {
            return;
        }
        let message_id = message.version.id;
        let progress = self.table.apply(message.version, message.content);
        match progress {
            LeaseProgress::Changed | LeaseProgress::Current => self.ask_at = now + FULL_INTERVAL,
            LeaseProgress::Partial => self.ask_at = now + LEASES_ANSWER_TIMEOUT,
            LeaseProgress::Incomplete => self.ask_at = self.ask_at.min(now + MISSING_CHANGE_WAIT),
        }
        if progress == LeaseProgress::Changed {
            self.check_at = now;
        }
        self.is_unsaved |= self.table.version() != before;
        if self.table.version().is_some_and(|known| known.id == message_id) {
            self.last_received = Some(now);
        }
    }

    /// Whether a message is from another coordinator than the current one: brokers with different settings may both
    /// publish to a hub. The first one is followed until its messages stop.
    fn is_of_other_coordinator(&self, message: &LeaseMessage, now: Instant) -> bool {
        let is_other = self.table.version().is_some_and(|known| known.id != message.version.id);
        let is_heard =
            self.last_received.is_some_and(|then| now.saturating_duration_since(then) < COORDINATOR_SILENCE_TIMEOUT);
        matches!(self.source, LeaseSource::Tenants(_)) && is_other && is_heard
    }

    /// Schedules a request to a broker at this time at the latest.
    pub fn ask_by(&mut self, time: Instant) {
        self.ask_at = self.ask_at.min(time);
    }

    /// Whether a broker has to be asked now; the next request is due after the answer timeout.
    pub fn request_due(&mut self, now: Instant) -> bool {
        let is_due = self.ask_at <= now;
        if is_due {
            self.ask_at = now + LEASES_ANSWER_TIMEOUT;
        }
        is_due
    }

    /// The interface may have changed: schedules all checks now.
    pub fn expedite(&mut self, now: Instant) {
        (self.check_at, self.forwarding_check_at) = (now, now);
    }

    /// Whether the peers have to be compared now; schedules the next comparison.
    pub fn take_check(&mut self, now: Instant) -> bool {
        let is_due = self.check_at <= now;
        if is_due {
            self.check_at = now + PEERS_CHECK_INTERVAL;
        }
        is_due
    }

    /// Whether the forwarding has to be checked.
    pub fn is_forwarding_check_due(&self, now: Instant) -> bool {
        self.forwarding_check_at <= now
    }

    /// The forwarding is complete: schedules the next check.
    pub fn on_forwarding_checked(&mut self, now: Instant) {
        self.forwarding_check_at = now + FORWARDING_CHECK_INTERVAL;
    }

    /// When the next request or comparison is due.
    pub fn due(&self) -> Instant {
        self.ask_at.min(self.check_at)
    }

    /// Plans the steps for the peers of the interface. The state has to be stored before they are applied.
    pub fn plan(&mut self, device: &Device) -> LeasePlan {
        let wanted = WantedLeases { networks: self.source.networks(), leases: self.table.leases(), made: &self.made };
        let plan = plan(device, wanted);
        let made = self.made.len();
        self.made.retain(|key| self.table.leases().contains_key(key) || device.peers.contains_key(key));
        // Added keys have a lease: they are stored with a new version, or because they are no longer foreign.
        self.is_unsaved |= self.made.len() != made || self.foreign != plan.foreign;
        self.made.extend(self.table.leases().keys().filter(|key| !plan.foreign.contains(key)));
        self.foreign.clone_from(&plan.foreign);
        plan
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use wgkex_common::address::tenants::TenantNetworks;
    use wgkex_common::config::HubSettings;
    use wgkex_common::wire::lease::{HUB, LeaseChunk, LeaseContent, LeaseVersion};

    use super::*;
    use crate::testing::key;

    fn hub(now: Instant) -> ServerState {
        let networks = TenantNetworks { pool: vec!["10.64.0.0/10".parse().unwrap()], tenant_length: 20 };
        let hub = HubSettings {
            interface: "wg-hub".into(),
            key_file: "/k".into(),
            listen_port: 51830,
            endpoint: None,
            networks,
        };
        ServerState::new(HUB.into(), LeaseSource::Tenants(hub), StoredServer::default(), now)
    }

    fn all(id: i64, n: u32) -> LeaseMessage {
        let address: IpAddr = "10.64.0.1".parse().unwrap();
        let chunk = LeaseChunk { number: 0, is_last: true, leases: [(key(n), address.into())].into() };
        LeaseMessage {
            server: HUB.into(),
            version: LeaseVersion { id, revision: 0 },
            content: LeaseContent::Chunk(chunk),
        }
    }

    /// Two coordinators would remove each other's peers, again and again.
    #[test]
    fn of_two_brokers_that_publish_to_a_hub_one_counts_as_long_as_it_publishes() {
        let start = Instant::now();
        let mut state = hub(start);
        state.on_message(all(1, 1), start);
        for seconds in [1, 10, 14] {
            state.on_message(all(2, 2), start + Duration::from_secs(seconds));
            assert!(state.table.leases().contains_key(&key(1)), "{seconds}");
        }
        let current = LeaseMessage { content: LeaseContent::Current, ..all(1, 1) };
        state.on_message(current, start + Duration::from_secs(14));
        state.on_message(all(2, 2), start + Duration::from_secs(20));
        assert!(state.table.leases().contains_key(&key(1)), "it was heard");
        state.on_message(all(2, 2), start + Duration::from_secs(30));
        assert_eq!(state.table.leases().keys().copied().collect::<Vec<_>>(), [key(2)]);
    }
}
