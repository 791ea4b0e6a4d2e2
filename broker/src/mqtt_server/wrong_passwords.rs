//! How many wrong passwords a client may send. No IO.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::client_ip::Client;

/// The most wrong passwords of a client at once, for all users together and for one; then it has to wait.
const BURST_PER_CLIENT: u32 = 40;
const BURST_PER_USER: u32 = 5;
/// The time per further wrong password, for all users together and for one. So a client that guesses one user's
/// password has an eighth of the rate at which a gateway behind the same address, which is another user, would have to
/// wait.
const GUESS_INTERVAL: Duration = Duration::from_millis(125);
const GUESS_INTERVAL_PER_USER: Duration = Duration::from_secs(1);

/// The clients that recently sent a wrong password. They are few: passwords are verified one after the other, and each takes a
/// while.
#[derive(Debug, Default)]
pub struct WrongPasswords {
    of_clients: BTreeMap<Client, Instant>,
    of_users: BTreeMap<(Client, u64), Instant>,
}

impl WrongPasswords {
    /// Whether `client` may try a password of `user`, the number of a name that may exist or not.
    pub fn may_try(&self, client: Client, user: u64, now: Instant) -> bool {
        has_room(self.of_clients.get(&client), (GUESS_INTERVAL, BURST_PER_CLIENT), now)
            && has_room(self.of_users.get(&(client, user)), (GUESS_INTERVAL_PER_USER, BURST_PER_USER), now)
    }

    /// `client` sent a wrong password of `user`.
    pub fn was_wrong(&mut self, client: Client, user: u64, now: Instant) {
        self.of_clients.retain(|_, paid| *paid > now);
        self.of_users.retain(|_, paid| *paid > now);
        *self.of_clients.entry(client).or_insert(now) += GUESS_INTERVAL;
        *self.of_users.entry((client, user)).or_insert(now) += GUESS_INTERVAL_PER_USER;
    }
}

/// Whether less than a burst is unpaid.
fn has_room(paid: Option<&Instant>, (period, burst): (Duration, u32), now: Instant) -> bool {
    paid.is_none_or(|paid| paid.saturating_duration_since(now) + period <= period * burst)
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    fn client(n: u8) -> Client {
        IpAddr::from([192, 0, 2, n]).into()
    }

    /// How many tries of `user` are allowed at once, if all are wrong.
    fn tries(wrong_passwords: &mut WrongPasswords, client: Client, user: u64, now: Instant) -> usize {
        let wrong = |_: &usize| {
            wrong_passwords.may_try(client, user, now).then(|| wrong_passwords.was_wrong(client, user, now)).is_some()
        };
        (0..100).take_while(wrong).count()
    }

    #[test]
    fn guesses_are_few_and_those_of_others_are_not_counted() {
        let (mut wrong_passwords, now) = (WrongPasswords::default(), Instant::now());
        assert_eq!(tries(&mut wrong_passwords, client(1), 7, now), 5);
        assert_eq!(tries(&mut wrong_passwords, client(1), 8, now), 5, "another user behind the same address");
        assert_eq!(tries(&mut wrong_passwords, client(2), 7, now), 5, "the same user from elsewhere");
        assert_eq!(tries(&mut wrong_passwords, client(1), 7, now + Duration::from_secs(2)), 2);
        let all: usize = (100..200).map(|user| tries(&mut wrong_passwords, client(3), user, now)).sum();
        assert_eq!(all, 40);
        assert!(
            !wrong_passwords.may_try(client(3), 7, now) && wrong_passwords.may_try(client(3), 7, now + GUESS_INTERVAL)
        );
        assert!(wrong_passwords.may_try(client(2), 8, now));
    }

    #[test]
    fn old_wrong_passwords_are_forgotten() {
        let (mut wrong_passwords, now) = (WrongPasswords::default(), Instant::now());
        (0..100).for_each(|n| wrong_passwords.was_wrong(client(n), 1, now));
        wrong_passwords.was_wrong(client(200), 1, now + Duration::from_secs(2));
        assert_eq!((wrong_passwords.of_clients.len(), wrong_passwords.of_users.len()), (1, 1));
    }
}
