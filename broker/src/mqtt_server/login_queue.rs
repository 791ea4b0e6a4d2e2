//! The logins whose passwords are to be verified, and which of them is next. No IO.

use std::collections::{BTreeMap, VecDeque};
use std::mem;

use crate::client_ip::Client;

/// The most logins in each lane: more would time out before their turn.
pub const LANE_MAX: usize = 256;

/// From where a user logs in.
#[derive(Debug, Clone, Copy)]
pub struct LoginOrigin {
    /// Which client it is.
    pub client: Client,
    /// A user logged in from there before.
    pub is_known: bool,
}

/// The queue, in two lanes that take turns: clients with a successful login before, and the others. In each lane the clients
/// take turns, whatever number of logins each has.
#[derive(Debug)]
pub struct LoginQueue<T> {
    known: Lane<T>,
    unknown: Lane<T>,
    was_known: bool,
}

#[derive(Debug)]
struct Lane<T> {
    turns: VecDeque<Client>,
    of_clients: BTreeMap<Client, VecDeque<T>>,
}

impl<T> Default for LoginQueue<T> {
    fn default() -> Self {
        Self { known: Lane::default(), unknown: Lane::default(), was_known: false }
    }
}

impl<T> Default for Lane<T> {
    fn default() -> Self {
        Self { turns: VecDeque::new(), of_clients: BTreeMap::new() }
    }
}

impl<T> LoginQueue<T> {
    /// Adds a login. If there is no room, returns the one to drop: the last one of the client with the most.
    pub fn push(&mut self, LoginOrigin { client, is_known }: LoginOrigin, item: T) -> Option<T> {
        let lane = if is_known { &mut self.known } else { &mut self.unknown };
        lane.push(client, item)
    }

    /// The next login to verify.
    pub fn next(&mut self) -> Option<T> {
        let of_known = |queue: &mut Self| queue.known.next().map(|item| (item, true));
        let of_unknown = |queue: &mut Self| queue.unknown.next().map(|item| (item, false));
        let next = if self.was_known {
            of_unknown(self).or_else(|| of_known(self))
        } else {
            of_known(self).or_else(|| of_unknown(self))
        };
        let (item, is_known) = next?;
        self.was_known = is_known;
        Some(item)
    }

    /// Takes out the logins that `verdict` decides.
    pub fn settle<V>(&mut self, mut verdict: impl FnMut(&T) -> Option<V>) -> Vec<(T, V)> {
        let mut settled = self.known.settle(&mut verdict);
        settled.extend(self.unknown.settle(verdict));
        settled
    }
}

impl<T> Lane<T> {
    fn push(&mut self, client: Client, item: T) -> Option<T> {
        let own = self.of_clients.get(&client).map_or(0, VecDeque::len);
        let goes = if self.of_clients.values().map(VecDeque::len).sum::<usize>() < LANE_MAX {
            None
        } else {
            let most = self.of_clients.values_mut().max_by_key(|items| items.len());
            // The client that loses one has at least as many left as the new one's client gets.
            match most.filter(|items| items.len() > own + 1).and_then(VecDeque::pop_back) {
                Some(goes) => Some(goes),
                None => return Some(item),
            }
        };
        if own == 0 {
            self.turns.push_back(client);
        }
        self.of_clients.entry(client).or_default().push_back(item);
        goes
    }

    fn next(&mut self) -> Option<T> {
        let client = self.turns.pop_front()?;
        let items = self.of_clients.get_mut(&client)?;
        let item = items.pop_front();
        if items.is_empty() {
            self.of_clients.remove(&client);
        } else {
            self.turns.push_back(client);
        }
        item
    }

    fn settle<V>(&mut self, mut verdict: impl FnMut(&T) -> Option<V>) -> Vec<(T, V)> {
        let mut settled = Vec::new();
        for items in self.of_clients.values_mut() {
            for item in mem::take(items) {
                match verdict(&item) {
                    Some(verdict) => settled.push((item, verdict)),
                    None => items.push_back(item),
                }
            }
        }
        self.of_clients.retain(|_, items| !items.is_empty());
        self.turns.retain(|client| self.of_clients.contains_key(client));
        settled
    }
}

#[cfg(test)]
mod tests {
    use std::iter;
    use std::net::IpAddr;

    use super::*;

    fn stranger(n: usize) -> LoginOrigin {
        let [.., high, low] = n.to_be_bytes();
        LoginOrigin { client: IpAddr::from([10, 0, high, low]).into(), is_known: false }
    }

    fn known(n: usize) -> LoginOrigin {
        LoginOrigin { is_known: true, ..stranger(n) }
    }

    fn queue(waiting: &[(LoginOrigin, usize)]) -> LoginQueue<usize> {
        let mut queue = LoginQueue::default();
        assert!(waiting.iter().all(|(origin, item)| queue.push(*origin, *item).is_none()));
        queue
    }

    fn turns(mut queue: LoginQueue<usize>) -> Vec<usize> {
        iter::from_fn(|| queue.next()).collect()
    }

    #[test]
    fn clients_take_turns_and_so_do_known_and_unknown_ones() {
        let (a, b, c, k) = (stranger(1), stranger(2), stranger(3), known(4));
        for (waiting, expected) in [
            (&[][..], &[][..]),
            (&[(a, 1), (a, 2), (a, 3), (b, 4), (b, 5), (c, 6)], &[1, 4, 6, 2, 5, 3]),
            (&[(a, 1), (a, 2), (k, 3), (k, 4), (k, 5)], &[3, 1, 4, 2, 5]),
            (&[(k, 1), (k, 2)], &[1, 2]),
        ] {
            assert_eq!(turns(queue(waiting)), expected, "{waiting:?}");
        }
    }

    #[test]
    fn a_newcomer_waits_for_one_login_of_each_crowded_client() {
        let mut queue = LoginQueue::default();
        (0..LANE_MAX).for_each(|n| assert_eq!(queue.push(stranger(n % 16), n), None));
        assert!((0..100).all(|_| queue.next().is_some_and(|n| queue.push(stranger(n % 16), n).is_none())));
        let lost = queue.push(stranger(99), 1_000);
        assert!(lost.is_some_and(|n| n < LANE_MAX), "{lost:?}");
        // Newcomers of the crowd do not take its place.
        (0..1_000).for_each(|n| assert_ne!(queue.push(stranger(n % 16), 2_000 + n), Some(1_000)));
        assert_eq!(turns(queue).into_iter().position(|n| n == 1_000), Some(16));
    }

    #[test]
    fn where_all_clients_have_few_the_newcomer_is_dropped() {
        let mut queue = LoginQueue::default();
        (0..LANE_MAX).for_each(|n| assert_eq!(queue.push(stranger(n), n), None));
        assert_eq!(queue.push(stranger(1_000), 1_000), Some(1_000));
        assert_eq!(queue.push(stranger(3), 1_001), Some(1_001));
        assert_eq!(queue.push(known(1_000), 1_002), None, "there are other places for those");
    }

    #[test]
    fn one_client_may_fill_the_queue_until_another_comes() {
        let mut queue = LoginQueue::default();
        (0..LANE_MAX).for_each(|n| assert_eq!(queue.push(stranger(1), n), None));
        assert_eq!(queue.push(stranger(1), LANE_MAX), Some(LANE_MAX));
        assert_eq!(queue.push(stranger(2), 1_000), Some(LANE_MAX - 1));
        assert_eq!(turns(queue)[..3], [0, 1_000, 1]);
    }

    #[test]
    fn decided_logins_leave_the_queue() {
        let (a, b, c) = (stranger(1), stranger(2), known(3));
        let mut queue = queue(&[(a, 1), (a, 2), (b, 4), (c, 6), (a, 3)]);
        assert_eq!(queue.settle(|item| (item % 2 == 0).then_some(())), [6, 2, 4].map(|item| (item, ())));
        assert_eq!(queue.push(b, 8), None);
        assert_eq!(turns(queue), [1, 8, 3]);
    }
}
