//! The users that may log in, and the client names of their connections.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Instant;

use anyhow::{Context as _, anyhow};
use parking_lot::Mutex;
use ring::hmac::{self, HMAC_SHA256};
use ring::rand::{SecureRandom as _, SystemRandom};
use rumqttc::Login;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use wgkex_common::config::{Credentials, MqttListen, MqttUser, Role, Secret};

use crate::client_ip::Client;
use crate::mqtt_server::acl::TopicAccess;
use crate::mqtt_server::login_queue::{LoginOrigin, LoginQueue};
use crate::mqtt_server::password::{self, Verifier};
use crate::mqtt_server::quota::Account;
use crate::mqtt_server::wrong_passwords::WrongPasswords;

const NO_RANDOM: &str = "the system gives no random numbers";

/// The name of this broker itself, which no user of the config can have.
const OWN: &str = "/";

/// The user of a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum User {
    /// Any client, where there are no users.
    Anyone,
    /// A user of this name.
    Named(String, Role),
}

/// The users that may log in.
pub struct Users {
    known: BTreeMap<String, Arc<UserEntry>>,
    /// The account that all clients share where there are no users.
    anyone: Account,
    passwords: Arc<Passwords>,
    /// Wakes the thread that verifies passwords; it ends when this is dropped.
    wake: SyncSender<()>,
    /// Cancelled by the end of that thread.
    thread_end: CancellationToken,
}

/// The known passwords, and those that are to be verified: by one thread, one after the other. Each takes a core for a
/// while, and 19 MiB.
struct Passwords {
    queue: Mutex<LoginQueue<Check>>,
    wrong: Mutex<WrongPasswords>,
    /// The key of the tags by which right passwords are remembered, so that only strangers wait for the slow hash.
    tags: hmac::Key,
}

/// A password that is to be verified.
struct Check {
    known: Arc<UserEntry>,
    password: String,
    client: Client,
    /// The number of the user's name.
    number: u64,
    answer: oneshot::Sender<Result<bool, Denied>>,
}

struct UserEntry {
    hash: Secret,
    role: Role,
    tag: Mutex<Option<hmac::Tag>>,
    account: Account,
}

/// Why a login is denied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Denied {
    /// It gives no name and password.
    NoLogin,
    /// There is no user of this name.
    NoUser,
    /// The password is wrong.
    Wrong,
    /// There were too many wrong ones to verify another one now.
    TooOften,
    /// Too many other passwords wait to be verified.
    Crowded,
}

impl User {
    /// The user's rights.
    pub fn access(&self) -> TopicAccess {
        match self {
            Self::Anyone => TopicAccess::everything(),
            Self::Named(name, role) => TopicAccess::of(*role, name),
        }
    }

    /// Its name; empty if it has none.
    pub fn into_name(self) -> String {
        match self {
            Self::Anyone => String::new(),
            Self::Named(name, _) => name,
        }
    }

    /// The name by which the client of this id, which has no line breaks, is known; none if the user may not have the id. A worker's
    /// clients have its name, or begin with it. No two users' clients have the same name.
    pub fn client(&self, id: &str) -> Option<String> {
        let is_own = |name: &str| id.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'));
        match self {
            Self::Anyone => Some(format!("\n{id}")),
            Self::Named(name, Role::Worker) if !is_own(name) => None,
            Self::Named(name, _) => Some(format!("{name}\n{id}")),
        }
    }

    /// The id of a client that gives none.
    pub fn new_id(&self) -> String {
        let number = fastrand::u64(..);
        match self {
            Self::Anyone => format!("auto-{number:016x}"),
            Self::Named(name, _) => format!("{name}-auto-{number:016x}"),
        }
    }
}

impl Users {
    /// The users of the config.
    pub fn new(config: &MqttListen) -> anyhow::Result<Self> {
        let mut users = Self::none()?;
        for (name, MqttUser { password_hash, role }) in &config.users {
            password::check(password_hash.expose())
                .with_context(|| format!("mqtt_listen.users.{name}.password_hash"))?;
            let account = Account::of(*role, config.users.len(), config.max_connections);
            let known = UserEntry { hash: password_hash.clone(), role: *role, tag: Mutex::default(), account };
            users.known.insert(name.clone(), Arc::new(known));
        }
        Ok(users)
    }

    fn none() -> anyhow::Result<Self> {
        let tags = hmac::Key::generate(HMAC_SHA256, &SystemRandom::new()).map_err(|_| anyhow!("{NO_RANDOM}"))?;
        let passwords = Arc::new(Passwords { queue: Mutex::default(), wrong: Mutex::default(), tags });
        let (wake, woken) = sync_channel(1);
        let (verifying, thread_end) = (passwords.clone(), CancellationToken::new());
        let (thread, end) = (thread::Builder::new().name("mqtt-passwords".into()), thread_end.clone().drop_guard());
        let verify = move || {
            verifying.verify_all(&woken);
            drop(end);
        };
        thread.spawn(verify).context("the thread for passwords does not start")?;
        Ok(Self { known: BTreeMap::new(), anyone: Account::of_anyone(), passwords, wake, thread_end })
    }

    /// Returns when the thread that verifies passwords has ended, without which no other password is ever right.
    pub async fn thread_ended(&self) {
        self.thread_end.cancelled().await;
    }

    /// This broker itself, and how it logs in: with a password that never leaves the process.
    pub fn own() -> anyhow::Result<(Self, Credentials)> {
        let mut random = [0; 32];
        SystemRandom::new().fill(&mut random).map_err(|_| anyhow!("{NO_RANDOM}"))?;
        let password = hex::encode(random);
        let mut users = Self::none()?;
        let tag = Mutex::new(Some(users.passwords.tag(&password)));
        let known = UserEntry { hash: Secret::new(String::new()), role: Role::Broker, tag, account: Account::own() };
        users.known.insert(OWN.into(), Arc::new(known));
        Ok((users, Credentials { username: OWN.into(), password: Secret::new(password) }))
    }

    /// The user of this login, and the account that it shares with its other connections. A name that no user has takes
    /// as long as a wrong password.
    pub async fn admit(&self, login: Option<Login>, origin: LoginOrigin) -> Result<(User, Account), Denied> {
        if self.known.is_empty() {
            return Ok((User::Anyone, self.anyone.with_new_rate()));
        }
        let Login { username, password } = login.ok_or(Denied::NoLogin)?;
        let number = self.number(&username);
        let user = self.known.get(&username);
        let Some(verified) = user.or_else(|| self.stand_in(number)) else { return Err(Denied::NoUser) };
        let is_remembered = user.is_some_and(|user| self.passwords.remembers(user, &password));
        let is_right = is_remembered || self.verify(verified, password, (origin, number)).await?;
        match user {
            Some(user) if is_right => Ok((User::Named(username, user.role), user.account.clone())),
            Some(_) => Err(Denied::Wrong),
            None => Err(Denied::NoUser),
        }
    }

    /// Whether there is a user of this name.
    pub fn has(&self, name: &str) -> bool {
        self.known.contains_key(name)
    }

    /// The number of a name, which may be any text.
    fn number(&self, name: &str) -> u64 {
        let tag = self.passwords.tag(name);
        tag.as_ref().iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    /// The user whose hash is used for the name of a user that does not exist: always the same for a name.
    fn stand_in(&self, number: u64) -> Option<&Arc<UserEntry>> {
        let place = number.checked_rem(self.known.len() as u64)?;
        self.known.values().nth(usize::try_from(place).ok()?)
    }

    async fn verify(
        &self,
        known: &Arc<UserEntry>,
        password: String,
        (LoginOrigin { client, is_known }, number): (LoginOrigin, u64),
    ) -> Result<bool, Denied> {
        let (answer, answered) = oneshot::channel();
        let check = Check { known: known.clone(), password, client, number, answer };
        if let Some(verdict) = self.passwords.verdict(&check, Instant::now()) {
            return verdict;
        }
        let goes = self.passwords.queue.lock().push(LoginOrigin { client, is_known }, check);
        if let Some(goes) = goes {
            goes.answer(Err(Denied::Crowded));
        }
        // If the channel is full, the thread is about to wake.
        let _ = self.wake.try_send(());
        answered.await.unwrap_or(Err(Denied::Crowded))
    }
}

impl Passwords {
    fn verify_all(&self, woken: &Receiver<()>) {
        let mut verifier = Verifier::default();
        while woken.recv().is_ok() {
            while let Some(check) = self.next() {
                let is_right = verifier.verify(check.known.hash.expose(), &check.password);
                if is_right {
                    *check.known.tag.lock() = Some(self.tag(&check.password));
                } else {
                    self.wrong.lock().was_wrong(check.client, check.number, Instant::now());
                }
                check.answer(Ok(is_right));
            }
        }
    }

    /// The next password to verify. Logins that need no verification by now are answered.
    fn next(&self) -> Option<Check> {
        let (now, mut queue) = (Instant::now(), self.queue.lock());
        for (check, verdict) in queue.settle(|check| self.verdict(check, now)) {
            check.answer(verdict);
        }
        queue.next()
    }

    /// The answer, if the password need not be verified.
    fn verdict(&self, check: &Check, now: Instant) -> Option<Result<bool, Denied>> {
        let Check { known, password, client, number, answer } = check;
        if answer.is_closed() {
            Some(Ok(false))
        } else if self.remembers(known, password) {
            Some(Ok(true))
        } else if self.wrong.lock().may_try(*client, *number, now) {
            None
        } else {
            Some(Err(Denied::TooOften))
        }
    }

    fn remembers(&self, known: &UserEntry, password: &str) -> bool {
        let tag = *known.tag.lock();
        tag.is_some_and(|tag| hmac::verify(&self.tags, password.as_bytes(), tag.as_ref()).is_ok())
    }

    fn tag(&self, text: &str) -> hmac::Tag {
        hmac::sign(&self.tags, text.as_bytes())
    }
}

impl Check {
    /// Sends the verdict to the login that waits for it, unless that gave up.
    fn answer(self, verdict: Result<bool, Denied>) {
        let _ = self.answer.send(verdict);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::net::IpAddr;
    use std::time::Duration;

    use futures_util::future::select_all;
    use tokio::time::timeout;

    use super::*;
    use crate::mqtt_server::login_queue::LANE_MAX;

    fn users() -> Users {
        let user = |role| MqttUser { password_hash: Secret::new(password::hash("right").unwrap()), role };
        let users = [("gw1", Role::Worker), ("b", Role::Broker)].map(|(name, role)| (name.to_owned(), user(role)));
        Users::new(&listen(users.into())).unwrap()
    }

    fn listen(users: BTreeMap<String, MqttUser>) -> MqttListen {
        MqttListen { address: ([127, 0, 0, 1], 0).into(), tls: None, users, max_connections: 10 }
    }

    /// The `n`th origin from which no user logged in before.
    fn from(n: u8) -> LoginOrigin {
        LoginOrigin { client: IpAddr::from([192, 0, 2, n]).into(), is_known: false }
    }

    async fn admit(users: &Users, login: Option<Login>) -> Result<User, Denied> {
        users.admit(login, from(1)).await.map(|(user, _)| user)
    }

    fn login(name: &str, password: &str) -> Login {
        Login::new(name, password)
    }

    #[tokio::test]
    async fn only_the_right_password_is_let_in_however_often() {
        let users = users();
        for _ in 0..2 {
            for (name, password, denied) in [
                ("gw1", "wrong", Denied::Wrong),
                ("gw1", "", Denied::Wrong),
                ("gw2", "right", Denied::NoUser),
                ("", "right", Denied::NoUser),
            ] {
                assert_eq!(admit(&users, Some(login(name, password))).await, Err(denied), "{name} {password}");
            }
            assert_eq!(admit(&users, None).await, Err(Denied::NoLogin));
            let worker = User::Named("gw1".into(), Role::Worker);
            assert_eq!(admit(&users, Some(login("gw1", "right"))).await, Ok(worker));
        }
    }

    #[tokio::test]
    async fn without_users_everybody_is_let_in() {
        let users = Users::new(&listen(BTreeMap::new())).unwrap();
        assert_eq!(admit(&users, None).await, Ok(User::Anyone));
        assert_eq!(admit(&users, Some(login("x", "y"))).await, Ok(User::Anyone));
    }

    /// Users whose passwords are no longer verified by any thread.
    fn asleep(mut users: Users) -> Users {
        users.wake = sync_channel(1).0;
        while Arc::strong_count(&users.passwords) > 1 {
            thread::sleep(Duration::from_millis(1));
        }
        users
    }

    #[tokio::test]
    async fn the_end_of_the_thread_is_noticed() {
        let users = users();
        assert!(timeout(Duration::from_millis(100), users.thread_ended()).await.is_err());
        timeout(Duration::from_secs(10), asleep(users).thread_ended()).await.expect("it has ended");
    }

    #[tokio::test]
    async fn a_password_that_was_right_does_not_wait() {
        let users = users();
        assert!(admit(&users, Some(login("gw1", "right"))).await.is_ok());
        let users = asleep(users);
        assert!(admit(&users, Some(login("gw1", "right"))).await.is_ok());
        let waits = timeout(Duration::from_millis(100), admit(&users, Some(login("gw1", "wrong")))).await;
        assert!(waits.is_err(), "strangers wait for their turn");
    }

    #[tokio::test]
    async fn a_login_that_ended_or_is_answered_by_anothers_check_is_not_verified() {
        let users = asleep(users());
        let gives_up = timeout(Duration::from_millis(10), admit(&users, Some(login("gw2", "wrong")))).await;
        assert!(gives_up.is_err());
        let right = || admit(&users, Some(login("gw1", "right")));
        let wrong = || admit(&users, Some(login("b", "wrong")));
        let verifies = async {
            let check = users.passwords.next().unwrap();
            assert_eq!((&check.password[..], check.number), ("right", users.number("gw1")));
            *check.known.tag.lock() = Some(users.passwords.tag("right"));
            let client = from(1).client;
            (0..15).for_each(|_| users.passwords.wrong.lock().was_wrong(client, users.number("b"), Instant::now()));
            assert!(users.passwords.next().is_none());
            check.answer(Ok(true));
        };
        let (first, second, third, ()) = tokio::join!(right(), right(), wrong(), verifies);
        assert!(first.is_ok() && second.is_ok(), "{first:?} {second:?}");
        assert_eq!(third, Err(Denied::TooOften));
    }

    #[tokio::test]
    async fn a_login_without_a_place_in_the_queue_is_denied() {
        let users = asleep(users());
        let waiting = (0..=LANE_MAX).map(|_| Box::pin(admit(&users, Some(login("gw1", "wrong")))));
        let (told, ..) = timeout(Duration::from_secs(5), select_all(waiting)).await.unwrap();
        assert_eq!(told, Err(Denied::Crowded));
    }

    #[tokio::test]
    async fn a_guesser_is_stopped_and_others_are_not() {
        let users = users();
        // For a client that guesses, a name that no user has does not differ from others.
        for (name, denied) in [("gw1", Denied::Wrong), ("none", Denied::NoUser)] {
            assert_eq!(admit(&users, Some(login(name, "wrong"))).await, Err(denied), "{name}");
            let (client, number, now) = (from(1).client, users.number(name), Instant::now());
            assert!(users.passwords.wrong.lock().may_try(client, number, now));
            // More than are forgotten while the machine is busy with other tests.
            (0..15).for_each(|_| users.passwords.wrong.lock().was_wrong(client, number, now));
            assert_eq!(admit(&users, Some(login(name, "right"))).await, Err(Denied::TooOften), "{name}");
        }
        assert!(admit(&users, Some(login("b", "right"))).await.is_ok(), "another user");
        assert!(users.admit(Some(login("gw1", "right")), from(2)).await.is_ok(), "from elsewhere");
        assert!(admit(&users, Some(login("gw1", "right"))).await.is_ok(), "it is known by now");
    }

    #[test]
    fn a_workers_clients_have_its_name_and_no_two_users_share_one() {
        let (gw1, broker) = (User::Named("gw1".into(), Role::Worker), User::Named("b".into(), Role::Broker));
        for id in ["gw1", "gw1-applied", "gw1-"] {
            assert!(gw1.client(id).is_some(), "{id}");
        }
        for id in ["gw2", "gw1x", "gw", "", "GW1"] {
            assert_eq!(gw1.client(id), None, "{id}");
        }
        assert!(gw1.client(&gw1.new_id()).is_some());
        let other = User::Named("gw1-b".into(), Role::Worker);
        let all = [gw1, other, broker, User::Named(OWN.into(), Role::Broker), User::Anyone];
        let known_as = all.map(|user| user.client("gw1-b").unwrap());
        assert_eq!(BTreeSet::from(known_as.clone()).len(), known_as.len(), "{known_as:?}");
    }

    #[tokio::test]
    async fn the_brokers_own_password_is_right_and_no_other() {
        let (users, credentials) = Users::own().unwrap();
        let own = User::Named(OWN.into(), Role::Broker);
        assert_eq!(admit(&users, Some(login(OWN, credentials.password.expose()))).await, Ok(own));
        let password = credentials.password.expose();
        let wrong = [(OWN, "", Denied::Wrong), (OWN, "right", Denied::Wrong), ("", password, Denied::NoUser)];
        for (name, password, denied) in wrong {
            assert_eq!(admit(&users, Some(login(name, password))).await, Err(denied), "{name}");
        }
        assert_eq!(admit(&users, None).await, Err(Denied::NoLogin));
        assert_ne!(Users::own().unwrap().1, credentials);
    }

    #[test]
    fn a_password_hash_that_is_none_is_refused_with_its_key() {
        let user = MqttUser { password_hash: Secret::new("$argon2id$".into()), role: Role::Worker };
        let error = Users::new(&listen([("gw1".to_owned(), user)].into())).err().unwrap();
        assert!(error.to_string().contains("mqtt_listen.users.gw1.password_hash"), "{error:#}");
    }
}
