//! The connections that have not logged in yet. Strangers may hold all permits and never send a byte; that must not keep a
//! gateway out. [`PermitTable`] decides, without sockets and without a clock.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::client_ip::Client;

/// The most connections of unknown clients that have not logged in, and the most of known ones.
const WAITING_CONNECTIONS_MAX: usize = 512;
/// The most of one client, unless that is this machine.
const PER_CLIENT_MAX: usize = 64;
/// The most clients that are known for each user: those from which it logged in last.
const KNOWN_PER_USER_MAX: usize = 8;

/// The permits of one endpoint. Clones share them.
#[derive(Clone, Default)]
pub struct HandshakeLimiter(Arc<Mutex<Permits>>);

#[derive(Default)]
struct Permits {
    unknown: PermitTable<Arc<Notify>>,
    known: PermitTable<Arc<Notify>>,
    logins: Logins,
}

/// One connection's permit to log in, until it is dropped.
pub struct HandshakePermit {
    limiter: HandshakeLimiter,
    id: u64,
    client: Client,
    is_known: bool,
    evicted: Arc<Notify>,
}

impl HandshakeLimiter {
    /// A permit for a connection from `address`. If all are taken, the one that waits longest is evicted.
    pub fn acquire(&self, address: IpAddr) -> HandshakePermit {
        let (client, evicted) = (Client::from(address), Arc::new(Notify::new()));
        let mut permits = self.0.lock();
        let is_known = permits.logins.is_known(client);
        let id = permits.admit(is_known, client, evicted.clone());
        HandshakePermit { limiter: self.clone(), id, client, is_known, evicted }
    }
}

impl HandshakePermit {
    /// The client that has it.
    pub fn client(&self) -> Client {
        self.client
    }

    /// Whether a user logged in from there before.
    pub fn is_known(&self) -> bool {
        self.is_known
    }

    /// Notified when another connection took the permit.
    pub fn evicted(&self) -> Arc<Notify> {
        self.evicted.clone()
    }

    /// Gives it back: the connection has sent its CONNECT, and waits elsewhere.
    pub fn release(&mut self) {
        self.limiter.0.lock().table(self.is_known).remove(self.id);
    }

    /// Takes one again, as the newest one.
    pub fn reacquire(&mut self) {
        let mut permits = self.limiter.0.lock();
        self.id = permits.admit(self.is_known, self.client, self.evicted.clone());
    }

    /// `user` logged in from there.
    pub fn logged_in(&self, user: &str) {
        self.limiter.0.lock().logins.note(user, self.client);
    }
}

impl Drop for HandshakePermit {
    fn drop(&mut self) {
        self.limiter.0.lock().table(self.is_known).remove(self.id);
    }
}

impl Permits {
    fn admit(&mut self, is_known: bool, client: Client, evicted: Arc<Notify>) -> u64 {
        let (id, evicts) = self.table(is_known).admit(client, evicted);
        if let Some(evicts) = evicts {
            evicts.notify_one();
        }
        id
    }

    fn table(&mut self, is_known: bool) -> &mut PermitTable<Arc<Notify>> {
        if is_known { &mut self.known } else { &mut self.unknown }
    }
}

/// The connections that wait, oldest first. `H` is how one is notified that it is evicted.
struct PermitTable<H> {
    next: u64,
    waiting: BTreeMap<u64, (Client, H)>,
    of_clients: HashMap<Client, BTreeSet<u64>>,
}

impl<H> Default for PermitTable<H> {
    fn default() -> Self {
        Self { next: 0, waiting: BTreeMap::new(), of_clients: HashMap::new() }
    }
}

impl<H> PermitTable<H> {
    /// Admits a connection; returns its id, and the handle of the one that is evicted for it.
    fn admit(&mut self, client: Client, handle: H) -> (u64, Option<H>) {
        let oldest_of_client = self.of_clients.get(&client).filter(|own| own.len() >= PER_CLIENT_MAX);
        let oldest_of_client = oldest_of_client.filter(|_| !client.is_this_machine()).and_then(BTreeSet::first);
        let oldest = self.waiting.keys().next().filter(|_| self.waiting.len() >= WAITING_CONNECTIONS_MAX);
        let evicted = oldest_of_client.or(oldest).copied().and_then(|oldest| self.remove(oldest));
        self.next += 1;
        self.waiting.insert(self.next, (client, handle));
        self.of_clients.entry(client).or_default().insert(self.next);
        (self.next, evicted)
    }

    fn remove(&mut self, id: u64) -> Option<H> {
        let (client, handle) = self.waiting.remove(&id)?;
        if let Some(own) = self.of_clients.get_mut(&client) {
            own.remove(&id);
            if own.is_empty() {
                self.of_clients.remove(&client);
            }
        }
        Some(handle)
    }
}

/// From where users logged in.
#[derive(Default)]
struct Logins {
    of_users: BTreeMap<String, VecDeque<Client>>,
    /// For how many users each client is known.
    users: HashMap<Client, usize>,
}

impl Logins {
    fn is_known(&self, client: Client) -> bool {
        self.users.contains_key(&client)
    }

    fn note(&mut self, user: &str, client: Client) {
        if !self.of_users.contains_key(user) {
            self.of_users.insert(user.to_owned(), VecDeque::new());
        }
        let Some(clients) = self.of_users.get_mut(user) else { return };
        if clients.contains(&client) {
            clients.retain(|other| *other != client);
        } else {
            *self.users.entry(client).or_default() += 1;
        }
        clients.push_back(client);
        if clients.len() > KNOWN_PER_USER_MAX
            && let Some(gone) = clients.pop_front()
            && let Some(users) = self.users.get_mut(&gone)
        {
            *users -= 1;
            if *users == 0 {
                self.users.remove(&gone);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(n: usize) -> Client {
        let [.., high, low] = n.to_be_bytes();
        IpAddr::from([10, 0, high, low]).into()
    }

    #[test]
    fn the_longest_waiting_goes_and_of_a_client_that_has_many_its_own() {
        let mut table = PermitTable::default();
        assert_eq!(table.admit(client(0), 0).1, None);
        assert!((1..=PER_CLIENT_MAX).all(|n| table.admit(client(1), n).1.is_none()));
        assert_eq!(table.admit(client(1), 1_000).1, Some(1));
        let others = WAITING_CONNECTIONS_MAX - PER_CLIENT_MAX - 1;
        assert!((0..others).all(|n| table.admit(client(2 + n), 2_000 + n).1.is_none()));
        assert_eq!(table.admit(client(1), 1_001).1, Some(2), "its own, as long as it has many");
        assert_eq!(table.admit(client(9_999), 3_000).1, Some(0));
        assert_eq!(table.admit(client(9_998), 3_001).1, Some(3));
        assert_eq!(table.waiting.len(), WAITING_CONNECTIONS_MAX);
    }

    #[test]
    fn this_machine_has_as_many_places_as_there_are() {
        let (mut table, loopback) = (PermitTable::default(), Client::from(IpAddr::from([127, 0, 0, 1])));
        assert!((0..WAITING_CONNECTIONS_MAX).all(|n| table.admit(loopback, n).1.is_none()));
        assert_eq!(table.admit(loopback, WAITING_CONNECTIONS_MAX).1, Some(0));
    }

    #[test]
    fn a_place_that_is_left_is_free() {
        let limiter = HandshakeLimiter::default();
        for n in 0..10 * WAITING_CONNECTIONS_MAX {
            drop(limiter.acquire([10, 0, 0, u8::try_from(n % 200).unwrap()].into()));
        }
        let permits = limiter.0.lock();
        assert!(permits.unknown.waiting.is_empty() && permits.unknown.of_clients.is_empty());
    }

    #[tokio::test]
    async fn strangers_take_no_permit_of_a_client_with_a_login_before() {
        let limiter = HandshakeLimiter::default();
        let address = |n: usize| IpAddr::from([10, 1, u8::try_from(n / 60).unwrap(), 1]);
        limiter.acquire([192, 0, 2, 1].into()).logged_in("gw1");
        let gateway = limiter.acquire([192, 0, 2, 1].into());
        assert!(gateway.is_known());
        let crowd: Vec<_> = (0..2 * WAITING_CONNECTIONS_MAX).map(|n| limiter.acquire(address(n))).collect();
        for place in &crowd[..WAITING_CONNECTIONS_MAX] {
            place.evicted().notified().await;
        }
        let waits = tokio::time::timeout(std::time::Duration::from_millis(50), gateway.evicted().notified()).await;
        assert!(waits.is_err());
    }

    #[tokio::test]
    async fn a_connection_that_sent_its_connect_is_not_evicted_until_it_waits_again() {
        let limiter = HandshakeLimiter::default();
        let crowd =
            || (0..WAITING_CONNECTIONS_MAX).map(|n| limiter.acquire([10, 2, u8::try_from(n / 60).unwrap(), 1].into()));
        let mut place = limiter.acquire([192, 0, 2, 1].into());
        let evicted = place.evicted();
        let waits = async || tokio::time::timeout(std::time::Duration::from_millis(50), evicted.notified()).await;
        place.release();
        drop(crowd().collect::<Vec<_>>());
        assert!(waits().await.is_err());
        place.reacquire();
        let _crowd: Vec<_> = crowd().collect();
        assert!(waits().await.is_ok());
    }

    #[test]
    fn a_user_makes_only_a_few_clients_known() {
        let mut logins = Logins::default();
        logins.note("gw2", client(0));
        (0..=KNOWN_PER_USER_MAX).for_each(|n| logins.note("gw1", client(n)));
        logins.note("gw1", client(1));
        logins.note("gw1", client(100));
        let known: Vec<_> = (0..=KNOWN_PER_USER_MAX).filter(|n| logins.is_known(client(*n))).collect();
        assert_eq!(known, [0, 1, 3, 4, 5, 6, 7, 8], "that of another user, and the last ones");
        assert_eq!(logins.users.len(), KNOWN_PER_USER_MAX + 1);
    }
}
