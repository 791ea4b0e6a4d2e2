//! The table of open connections, which decides which are closed. It has neither sockets nor a clock.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use super::activity::{BUSY, ConnectionActivity};
use super::{Capacity, Closed, IDLE_TIMEOUT, PeerKind};

/// The idle timeout when half of all are open.
const IDLE_CROWDED: Duration = Duration::from_secs(5);
/// How long an upgraded connection may take to end after its session has sent everything.
const ENDING_TIMEOUT: Duration = Duration::from_secs(3);

/// The open connections; `S` is the socket by which one is closed.
pub struct ConnectionTable<S> {
    capacity: Capacity,
    last: u64,
    open: BTreeMap<u64, OpenConnection<S>>,
    /// How many of them are upgraded; these are limited separately.
    upgraded: usize,
    clients: HashMap<IpAddr, usize>,
}

struct OpenConnection<S> {
    peer: PeerKind,
    socket: S,
    activity: Arc<ConnectionActivity>,
    is_upgraded: bool,
}

/// An entry in the table, and the connections that are evicted for it.
pub struct AdmittedConnection<S> {
    pub id: u64,
    pub evicted: Vec<S>,
}

impl<S> OpenConnection<S> {
    fn idle(&self) -> u64 {
        self.activity.idle()
    }

    fn buffered(&self) -> usize {
        self.activity.buffered()
    }
}

impl<S> ConnectionTable<S> {
    pub fn new(capacity: Capacity) -> Self {
        Self { capacity, last: 0, open: BTreeMap::new(), upgraded: 0, clients: HashMap::new() }
    }

    /// How many are not upgraded.
    pub fn len(&self) -> usize {
        self.open.len() - self.upgraded
    }

    /// How many are upgraded.
    pub fn upgraded(&self) -> usize {
        self.upgraded
    }

    /// Adds a connection. If the table is full, those are evicted whose client has been waited for the longest, be it
    /// for a request or for the body of one: a sixteenth at once, so that a flood does not cost a search each.
    pub fn admit(
        &mut self,
        peer: PeerKind,
        socket: S,
        activity: Arc<ConnectionActivity>,
    ) -> Result<AdmittedConnection<S>, (Closed, S)> {
        if let PeerKind::Client(client) = peer
            && self.clients.get(&client).is_some_and(|open| *open >= self.capacity.of_client)
        {
            return Err((Closed::Client, socket));
        }
        let evicted = if self.len() < self.capacity.open { Vec::new() } else { self.make_room() };
        if self.len() >= self.capacity.open {
            return Err((Closed::Full, socket));
        }
        self.last += 1;
        activity.set_id(self.last);
        self.open.insert(self.last, OpenConnection { peer, socket, activity, is_upgraded: false });
        if let PeerKind::Client(client) = peer {
            *self.clients.entry(client).or_default() += 1;
        }
        Ok(AdmittedConnection { id: self.last, evicted })
    }

    fn make_room(&mut self) -> Vec<S> {
        let idle = self.longest_idle(|open| !open.is_upgraded && open.idle() != BUSY);
        let room = (self.capacity.open / 16).max(1);
        idle.into_iter().take(room).filter_map(|id| self.remove(id)).collect()
    }

    /// Marks a connection as upgraded. If too many are, those that are not settled are evicted in the same way. None if
    /// that makes no room, or there is no such connection.
    pub fn upgrade(&mut self, id: u64) -> Option<Vec<S>> {
        if self.open.get(&id).is_none_or(|open| open.is_upgraded) {
            return None;
        }
        let mut evicted = Vec::new();
        if self.upgraded >= self.capacity.upgraded {
            let idle = self.longest_idle(|open| open.is_upgraded && open.idle() != BUSY);
            let room = self.capacity.upgraded / 16 + 1;
            evicted.extend(idle.into_iter().take(room).filter_map(|id| self.remove(id)));
        }
        let open = self.open.get_mut(&id).filter(|_| self.upgraded < self.capacity.upgraded)?;
        open.is_upgraded = true;
        open.activity.upgrade();
        self.upgraded += 1;
        Some(evicted)
    }

    /// If all hold more memory than they may, removes connections until they hold a quarter less than that.
    pub fn free_memory(&mut self) -> Vec<S> {
        let most = self.capacity.buffered;
        let mut buffered: usize = self.open.values().map(OpenConnection::buffered).sum();
        if buffered <= most {
            return Vec::new();
        }
        let mut evicted = Vec::new();
        for id in self.longest_idle(|open| open.buffered() > 0) {
            if buffered <= most / 4 * 3 {
                break;
            }
            buffered = buffered.saturating_sub(self.open.get(&id).map_or(0, OpenConnection::buffered));
            evicted.extend(self.remove(id));
        }
        evicted
    }

    /// The selected connections in the order of eviction: upgraded ones first, of these and of the others the longest
    /// idle first, and those with a running request last.
    fn longest_idle(&self, is_meant: impl Fn(&OpenConnection<S>) -> bool) -> Vec<u64> {
        let meant = self.open.iter().filter(|(_, open)| is_meant(open));
        let mut meant: Vec<_> = meant.map(|(id, open)| (!open.is_upgraded, open.idle(), *id)).collect();
        meant.sort_unstable();
        meant.into_iter().map(|(_, _, id)| id).collect()
    }

    pub fn remove(&mut self, id: u64) -> Option<S> {
        let OpenConnection { peer, socket, is_upgraded, .. } = self.open.remove(&id)?;
        self.upgraded -= usize::from(is_upgraded);
        if let PeerKind::Client(client) = peer
            && let Some(open) = self.clients.get_mut(&client)
        {
            *open -= 1;
            if *open == 0 {
                self.clients.remove(&client);
            }
        }
        Some(socket)
    }

    /// Removes connections that were idle for too long, and upgraded ones that take too long to end.
    pub fn expire(&mut self, now: u64) -> Vec<S> {
        let is_crowded = self.len() * 2 > self.capacity.open;
        let limit = |open: &OpenConnection<S>| match open {
            OpenConnection { is_upgraded: true, activity, .. } => activity.is_ending().then_some(ENDING_TIMEOUT),
            open if is_crowded && open.peer != PeerKind::Proxy => Some(IDLE_CROWDED),
            _ => Some(IDLE_TIMEOUT),
        };
        let over = |open: &OpenConnection<S>| {
            let since = open.idle();
            let idle = Duration::from_millis(now.saturating_sub(since));
            since != BUSY && limit(open).is_some_and(|limit| idle >= limit)
        };
        let over: Vec<_> = self.open.iter().filter(|(_, open)| over(open)).map(|(id, _)| *id).collect();
        over.into_iter().filter_map(|id| self.remove(id)).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::super::capacity::OF_CLIENT_MAX;
    use super::*;

    fn client(n: u8) -> PeerKind {
        PeerKind::Client([192, 0, 2, n].into())
    }

    fn table(open: usize, buffered: usize) -> ConnectionTable<u64> {
        ConnectionTable::new(Capacity { open, of_client: OF_CLIENT_MAX, pending: 0, upgraded: 4, buffered })
    }

    /// Adds a connection that is idle since then.
    fn admit(
        table: &mut ConnectionTable<u64>,
        peer: PeerKind,
        socket: u64,
        idle: u64,
    ) -> Option<(Arc<ConnectionActivity>, AdmittedConnection<u64>)> {
        let activity = ConnectionActivity::new(Instant::now());
        activity.wait_for_client(idle);
        let admitted = table.admit(peer, socket, activity.clone()).ok()?;
        Some((activity, admitted))
    }

    #[test]
    fn a_client_has_a_limit_of_connections_and_a_proxy_and_this_machine_none() {
        let mut table = table(10_000, 0);
        let open = u64::try_from(OF_CLIENT_MAX).unwrap();
        let first = admit(&mut table, client(1), 0, 0).unwrap().1.id;
        assert!((1..open).all(|socket| admit(&mut table, client(1), socket, 0).is_some()));
        let refused = table.admit(client(1), 7, ConnectionActivity::new(Instant::now())).err();
        assert_eq!(refused, Some((Closed::Client, 7)));
        assert!(admit(&mut table, client(2), 8, 0).is_some());
        for peer in [PeerKind::Proxy, PeerKind::Local] {
            assert!((0..=open).all(|socket| admit(&mut table, peer, socket, 0).is_some()));
        }
        assert_eq!(table.remove(first), Some(0));
        assert_eq!(table.remove(first), None);
        assert!(admit(&mut table, client(1), 9, 0).is_some());
    }

    #[test]
    fn a_full_table_evicts_the_longest_idle_connections_and_keeps_busy_ones() {
        let mut table = table(32, 0);
        let mut busy = Vec::new();
        for n in 0..32 {
            let (activity, _) = admit(&mut table, client(u8::try_from(n).unwrap()), n, 100 + n).unwrap();
            match n {
                0..4 => busy.push(activity.begin()),
                // The head of a request was received, and its body was not.
                4 => activity.wait_for_client(900),
                _ => {}
            }
        }
        assert_eq!(admit(&mut table, client(99), 99, 1000).unwrap().1.evicted, [5, 6]);
        assert_eq!(table.open.len(), 31);
        assert_eq!(table.clients.len(), 31);
        table.open.values().for_each(|open| open.activity.set_busy());
        let (activity, _) = admit(&mut table, client(100), 100, 1000).unwrap();
        let _busy = activity.begin();
        assert_eq!(table.admit(client(101), 101, activity).err(), Some((Closed::Full, 101)));
    }

    #[test]
    fn idle_connections_are_closed_and_sooner_when_half_are_open() {
        let idle = u64::try_from(IDLE_TIMEOUT.as_millis()).unwrap();
        let crowded = u64::try_from(IDLE_CROWDED.as_millis()).unwrap();
        let mut table = table(4, 0);
        let _busy = admit(&mut table, client(0), 0, 0).unwrap().0.begin();
        admit(&mut table, client(1), 1, 0).unwrap();
        assert_eq!(table.expire(idle - 1), [0; 0]);
        assert_eq!(table.expire(idle), [1]);
        admit(&mut table, client(2), 2, idle).unwrap();
        admit(&mut table, client(3), 3, idle + 1).unwrap();
        assert_eq!(table.expire(idle + crowded - 1), [0; 0]);
        assert_eq!(table.expire(idle + crowded), [2]);
        assert_eq!(table.expire(idle + crowded + 1), [0; 0], "half of all is not more than half");
        admit(&mut table, PeerKind::Proxy, 4, idle).unwrap();
        assert_eq!(table.expire(idle + crowded + 1), [3]);
        assert_eq!(table.expire(2 * idle - 1), [0; 0], "a proxy keeps its connections");
        assert_eq!(table.expire(2 * idle), [4]);
    }

    #[test]
    fn upgraded_connections_take_no_place_of_others_and_go_first_where_memory_is_short() {
        let mut table = table(2, 100);
        let mut upgraded = Vec::new();
        for socket in 0..4 {
            let (activity, admitted) = admit(&mut table, client(1), socket, 0).unwrap();
            assert_eq!((admitted.evicted.len(), table.upgrade(admitted.id).map(|evicted| evicted.len())), (0, Some(0)));
            upgraded.push((activity, admitted.id));
        }
        assert_eq!((table.len(), table.upgraded(), table.clients[&[192, 0, 2, 1].into()]), (0, 4, 4));
        for (activity, _) in &upgraded[1..] {
            activity.pin();
        }
        let (http, id) =
            admit(&mut table, client(2), 10, 0).map(|(activity, admitted)| (activity, admitted.id)).unwrap();
        admit(&mut table, client(3), 11, 5).unwrap();
        assert_eq!(table.upgrade(id), Some(vec![0]), "the one that is not settled");
        assert_eq!(table.upgrade(id), None, "it is already");
        http.pin();
        let (_flow, admitted) = admit(&mut table, client(4), 12, 6).unwrap();
        assert_eq!((table.upgrade(admitted.id), table.len(), table.upgraded()), (None, 2, 4));
        assert_eq!(table.make_room(), [11], "none of the upgraded ones");

        upgraded[2].0.set_buffered(60);
        table.open[&admitted.id].activity.set_buffered(60);
        assert_eq!(table.free_memory(), [2]);
        table.open[&admitted.id].activity.set_buffered(0);

        let ending = u64::try_from(ENDING_TIMEOUT.as_millis()).unwrap();
        upgraded[1].0.end();
        let now = upgraded[1].0.idle();
        let expired = |table: &mut ConnectionTable<u64>, now| -> Vec<_> {
            table.expire(now).into_iter().filter(|socket| *socket != 12).collect()
        };
        assert_eq!(expired(&mut table, now + ending - 1), [0; 0]);
        assert_eq!(expired(&mut table, now + ending), [1]);
        assert_eq!(expired(&mut table, u64::MAX - 1), [0; 0], "a settled one stays");
        assert_eq!((table.upgraded(), table.remove(upgraded[3].1)), (2, Some(3)));
        assert_eq!(table.upgraded(), 1);
    }

    #[test]
    fn too_much_held_memory_evicts_the_connections_longest_without_reading() {
        let mut table = table(100, 1000);
        let mut activities = Vec::new();
        for n in 0..10 {
            activities.push(admit(&mut table, client(1), n, 100 - n).unwrap().0);
            activities[activities.len() - 1].set_buffered(100);
        }
        assert_eq!(table.free_memory(), [0; 0], "that much they may");
        activities[9].set_buffered(0);
        let busy = activities[8].begin();
        activities[8].set_buffered(201);
        assert_eq!(table.free_memory(), [7, 6, 5], "who has no request under way goes first, who holds nothing stays");
        for activity in &activities {
            activity.set_buffered(0);
        }
        activities[8].set_buffered(1001);
        assert_eq!(table.free_memory(), [8]);
        drop(busy);
    }
}
