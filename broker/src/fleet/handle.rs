//! The shared handle to the fleet: its two locks, and the queries that need both.

use std::sync::Arc;
use std::time::Instant;

use parking_lot::{Mutex, MutexGuard};
use wgkex_common::{Domain, KeyId, WorkerName};

use crate::fleet::gateways::{Gateways, Online, Router};
use crate::fleet::live_keys::LiveKeys;
use crate::fleet::selection::Selection;
use crate::fleet::status::GatewayRating;

/// The gateways and the live keys. Clones share them.
#[derive(Clone)]
pub struct Fleet {
    gateways: Arc<Mutex<Gateways>>,
    live: Arc<Mutex<LiveKeys>>,
}

/// Why no router may have a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyConflict {
    /// It is a gateway's, or derives a gateway's address.
    Reserved,
    /// Another key has the address that it derives.
    AddressTaken,
}

/// Which gateway a router would be given.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// The best one that is preferred.
    pub preferred: Option<WorkerName>,
    /// The best one of all.
    pub best: Option<WorkerName>,
    /// Each gateway in the choice, or why it is not.
    pub standings: Vec<GatewayRating>,
}

impl Fleet {
    /// Of these gateways and live keys.
    #[must_use]
    pub fn new(gateways: Gateways, live: LiveKeys) -> Self {
        Self { gateways: Arc::new(Mutex::new(gateways)), live: Arc::new(Mutex::new(live)) }
    }

    /// The gateways, locked: for one query only.
    pub fn gateways(&self) -> MutexGuard<'_, Gateways> {
        self.gateways.lock()
    }

    /// The live keys, locked: for one query only.
    pub fn live(&self) -> MutexGuard<'_, LiveKeys> {
        self.live.lock()
    }

    /// Whether the key has had a handshake at some gateway; none if it is not known.
    #[must_use]
    pub fn is_established(&self, id: &KeyId) -> Option<bool> {
        self.live().is_established(&id.domain, &id.key)
    }

    /// Why no router may have the key.
    #[must_use]
    pub fn conflict(&self, id: &KeyId, now: Instant) -> Option<KeyConflict> {
        let is_routers = self.live().has_handshake(&id.key);
        if self.gateways().is_reserved(&id.key, is_routers) {
            Some(KeyConflict::Reserved)
        } else {
            self.live().is_taken(id.domain.name(), id.key, now).then_some(KeyConflict::AddressTaken)
        }
    }

    /// The gateways of a domain that are online. None while the retained states are incomplete, as after a reconnect: a
    /// gateway of ours whose hello is not received yet would count as an original, of which no confirmation is waited
    /// for.
    #[must_use]
    pub fn online(&self, domain: &Domain) -> Option<Online> {
        let gateways = self.gateways();
        gateways.is_synced().then(|| gateways.online(domain))
    }

    /// The best gateway of those that are `eligible`, none while the retained states are incomplete. The router counts as its
    /// peer from here on, so that requests at the same time spread; if the request fails, the gateway's own next count
    /// corrects that.
    pub fn select(&self, id: &KeyId, eligible: impl Fn(&WorkerName, bool) -> bool, now: Instant) -> Option<Selection> {
        let current_gateway = self.current_gateway(id, now);
        let mut gateways = self.gateways();
        if !gateways.is_synced() {
            return None;
        }
        let selection =
            gateways.select(Router { domain: &id.domain, current_gateway: current_gateway.as_ref(), now }, eligible)?;
        gateways.on_assigned(&selection.worker, &id.domain);
        Some(selection)
    }

    /// The gateway that the router was given a moment ago, if it still can be.
    #[must_use]
    pub fn select_again(&self, id: &KeyId, worker: &WorkerName, now: Instant) -> Option<Selection> {
        self.gateways().select(Router { domain: &id.domain, current_gateway: None, now }, |name, _| name == worker)
    }

    /// The choice that [`Self::select`] would make; nothing is counted.
    pub fn choice(&self, id: &KeyId, prefers: impl Fn(&WorkerName, bool) -> bool, now: Instant) -> Choice {
        let current_gateway = self.current_gateway(id, now);
        let (gateways, router) =
            (self.gateways(), Router { domain: &id.domain, current_gateway: current_gateway.as_ref(), now });
        let worker = |selection: Selection| selection.worker;
        Choice {
            preferred: gateways.select(router, prefers).map(worker),
            best: gateways.select(router, |_, _| true).map(worker),
            standings: gateways.standings(router),
        }
    }

    /// The router's request was answered with `worker`.
    pub fn on_given(&self, id: &KeyId, worker: &WorkerName, now: Instant) {
        let is_connected = {
            let mut live = self.live();
            live.on_given(id, worker, now);
            live.last_with_handshakes(id) == Some(worker)
        };
        self.gateways().on_given(worker, id, is_connected, now);
    }

    /// The gateway where the router is connected; it only counts while some gateway drains.
    fn current_gateway(&self, id: &KeyId, now: Instant) -> Option<WorkerName> {
        let is_any_draining = self.gateways().is_any_draining();
        is_any_draining.then(|| self.live().current_gateway(id, now).cloned()).flatten()
    }
}
