//! The changes that a worker would make to a domain's tables, without making them: by the same state and the same
//! plans.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;
use wgkex_common::access_lists::Admission;
use wgkex_common::storage::key_store::KeyRecord;
use wgkex_common::wire::drain::Deadline;
use wgkex_common::{Domain, PublicKey, Reserved};
use wgkex_kernel::{Change, Device, host};

use super::{DomainReconciler, KeyOutcomes};
use crate::peers::{Clocks, ORPHANED, Policy};
use crate::plan::{self, Planned, Reason, Step};
use crate::profiles::Profile;

/// The input of a preview beside the tables.
pub struct PreviewParts<'a> {
    /// The domain.
    pub domain: &'a Domain,
    /// The profile of its keys.
    pub profile: Arc<dyn Profile>,
    /// When peers are stale, and how many there may be.
    pub policy: Policy,
    /// The records of the domain in the state file.
    pub remembered: BTreeMap<PublicKey, KeyRecord>,
    /// Which keys the lists admit.
    pub admission: Arc<Admission>,
    /// The deadline of a drain, if it is over.
    pub deadline: Option<Deadline>,
    /// Reserved keys and addresses.
    pub reserved: &'a Reserved,
}

/// The changes that a worker would make to these tables now, in its order. A key that arrived within the grace is not
/// stale; a key that is not in the state file counts as older.
#[must_use]
pub fn preview(parts: PreviewParts<'_>, device: &Device, now: Clocks) -> Vec<Planned> {
    let PreviewParts { domain: name, profile, policy, remembered, admission, deadline, reserved } = parts;
    let mut domain = DomainReconciler::new(name.clone(), profile, policy, now.monotonic);
    for (key, record) in &remembered {
        domain.remember(*key, *record);
    }
    domain.apply_admission(admission);
    domain.on_read(device, reserved, now);
    let mut planned = Vec::new();
    let mut plan = |reason, steps: &[Step]| planned.extend(steps.iter().map(|step| Planned::of(reason, step)));

    let denials = domain.all_denials(device);
    domain.on_denials(&all_done(&denials));
    plan(Reason::Denied, &denials);

    let is_new = |key: &PublicKey| {
        let last = remembered.get(key).map(|record| record.last);
        last.is_some_and(|last| now.monotonic.saturating_duration_since(last) < policy.grace)
    };
    // A first read alone does not know when the keys arrived.
    let mut stale = domain.peers.stale_without_grace(now.monotonic);
    stale.retain(|key| !is_new(key));
    let removals = plan::remove(domain.peers.profile(), device, &stale);
    domain.on_removed(&all_done(&removals));
    plan(Reason::Stale, &removals);

    domain.set_deadline(deadline, now.monotonic);
    let portion = domain.plan_portion(device, now.monotonic);
    domain.on_portion(&portion, &all_done(&portion.steps), now.monotonic);
    plan(Reason::Drained, &portion.steps);

    domain.plan_evictions(device, now.monotonic);
    let evictions: Vec<_> = std::mem::take(&mut domain.evictions.steps).into();
    plan(Reason::Evicted, &evictions);
    plan(Reason::Silent, &domain.plan_renewals(device, now.monotonic));

    let missing = domain.peers.pending_steps(device, reserved);
    let mut orphaned = domain.peers.orphaned(device, now.monotonic + ORPHANED);
    // These will have their peers by then.
    let claimed: BTreeSet<_> = missing.iter().flat_map(|step| step.peer.destinations()).collect();
    orphaned.retain(|change| destination(change).is_none_or(|network| !claimed.contains(&network)));
    planned.extend(orphaned.into_iter().map(|change| Planned { reason: Reason::Orphaned, changes: vec![change] }));
    planned.extend(missing.iter().map(|step| Planned::of(Reason::Missing, step)));
    planned
}

impl DomainReconciler {
    /// The removals of all peers of keys that are not admitted, at once.
    fn all_denials(&mut self, device: &Device) -> Vec<Step> {
        let (admission, name) = (&self.admission, self.name.name());
        if admission.removes_none() {
            return Vec::new();
        }
        let peers = self.peers.remove_denied(|key| admission.must_remove(name, key));
        let ours = peers.into_iter().filter_map(|(key, is_ours)| is_ours.then_some(key)).collect();
        plan::remove_denied(self.peers.profile(), device, &ours, &BTreeSet::new())
    }
}

/// The destination of a route or a flood entry.
fn destination(change: &Change) -> Option<IpNet> {
    match change {
        Change::SetRoute(network) | Change::RemoveRoute(network) => Some(*network),
        Change::AddFdb(address) | Change::RemoveFdb(address) => Some(host(*address)),
        Change::SetPeer(_) | Change::ReplacePeer(_) | Change::RemovePeer(_) => None,
    }
}

fn all_done(steps: &[Step]) -> KeyOutcomes {
    steps.iter().map(|step| (step.key(), Ok(()))).collect()
}
