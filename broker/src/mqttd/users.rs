//! Who may connect, and as whom.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, anyhow};
use ring::hmac::{self, HMAC_SHA256};
use ring::rand::{SecureRandom as _, SystemRandom};
use rumqttc::Login;
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tracing::warn;
use wgkex_common::config::{Credentials, MqttUser, Role, Secret};

use crate::access::Access;
use crate::{lock, password};

/// So many passwords are verified at once; each takes a core for a while, and 19 MiB.
const AT_ONCE: usize = 2;
const NO_RANDOM: &str = "the system gives no random numbers";

/// What this broker itself is called, as no user of the config can be.
const OWN: &str = "/";

/// Who a client is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum User {
    /// Anybody, where there are no users.
    Anyone,
    /// A user of this name.
    Named(String, Role),
}

/// Who may connect.
pub struct Users {
    known: BTreeMap<String, Known>,
    verifying: Arc<Semaphore>,
    /// What a password that was right is remembered by, so that only strangers wait for the slow way.
    tags: hmac::Key,
}

struct Known {
    hash: Secret,
    role: Role,
    tag: Mutex<Option<hmac::Tag>>,
    /// That the password was wrong has been said.
    was_wrong: AtomicBool,
}

impl User {
    /// What the user may do.
    pub fn access(&self) -> Access {
        match self {
            Self::Anyone => Access::everything(),
            Self::Named(name, role) => Access::of(*role, name),
        }
    }

    /// As whom the client of this id, which has no line breaks, is known; none if the user may not have it. A worker's
    /// clients have its name, or begin with it. Nobody's are known as another's.
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
    pub fn new(users: &BTreeMap<String, MqttUser>) -> anyhow::Result<Self> {
        for (name, user) in users {
            password::check(user.password_hash.expose())
                .with_context(|| format!("mqtt_listen.users.{name}.password_hash"))?;
        }
        let known = |user: &MqttUser| Known {
            hash: user.password_hash.clone(),
            role: user.role,
            tag: Mutex::default(),
            was_wrong: AtomicBool::default(),
        };
        let tags = hmac::Key::generate(HMAC_SHA256, &SystemRandom::new());
        Ok(Self {
            known: users.iter().map(|(name, user)| (name.clone(), known(user))).collect(),
            verifying: Arc::new(Semaphore::new(AT_ONCE)),
            tags: tags.map_err(|_| anyhow!("{NO_RANDOM}"))?,
        })
    }

    /// This broker itself, and how it logs in: with a password that nobody else ever sees.
    pub fn own() -> anyhow::Result<(Self, Credentials)> {
        let mut random = [0; 32];
        SystemRandom::new().fill(&mut random).map_err(|_| anyhow!("{NO_RANDOM}"))?;
        let password = random.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"));
        let mut users = Self::new(&BTreeMap::new())?;
        let tag = Mutex::new(Some(hmac::sign(&users.tags, password.as_bytes())));
        let (hash, role, was_wrong) = (Secret::new(String::new()), Role::Broker, AtomicBool::default());
        users.known.insert(OWN.into(), Known { hash, role, tag, was_wrong });
        Ok((users, Credentials { username: OWN.into(), password: Secret::new(password) }))
    }

    /// Who it is that logs in so; none if the password is wrong, or there is no such user.
    pub async fn admit(&self, login: Option<Login>) -> Option<User> {
        if self.known.is_empty() {
            return Some(User::Anyone);
        }
        let Login { username, password } = login?;
        let known = self.known.get(&username)?;
        let is_right = self.remembers(known, &password) || self.verify(known, &password).await;
        if !known.was_wrong.swap(!is_right, Ordering::Relaxed) && !is_right {
            warn!(user = username, "wrong password for the MQTT server");
        }
        is_right.then_some(User::Named(username, known.role))
    }

    fn remembers(&self, known: &Known, password: &str) -> bool {
        let tag = *lock(&known.tag);
        tag.is_some_and(|tag| hmac::verify(&self.tags, password.as_bytes(), tag.as_ref()).is_ok())
    }

    async fn verify(&self, known: &Known, password: &str) -> bool {
        let Ok(turn) = self.verifying.clone().acquire_owned().await else { return false };
        // Another connection of the same user may have had its turn.
        if self.remembers(known, password) {
            return true;
        }
        let (hash, tried) = (known.hash.clone(), password.to_owned());
        let verified = spawn_blocking(move || {
            // Who gives up waiting does not free the turn.
            let _turn = turn;
            password::verify(hash.expose(), &tried)
        });
        let is_right = verified.await.unwrap_or(false);
        if is_right {
            *lock(&known.tag) = Some(hmac::sign(&self.tags, password.as_bytes()));
        }
        is_right
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::Duration;

    use super::*;

    fn users() -> Users {
        let user = |role| MqttUser { password_hash: Secret::new(password::hash("right").unwrap()), role };
        let users = [("gw1", Role::Worker), ("b", Role::Broker)].map(|(name, role)| (name.to_owned(), user(role)));
        Users::new(&users.into()).unwrap()
    }

    fn login(name: &str, password: &str) -> Login {
        Login::new(name, password)
    }

    #[tokio::test]
    async fn only_the_right_password_is_let_in_however_often() {
        let users = users();
        for _ in 0..2 {
            let wrong = [("gw1", "wrong"), ("gw1", ""), ("gw2", "right"), ("", "right")];
            for wrong in wrong.map(|(name, password)| Some(login(name, password))).into_iter().chain([None]) {
                assert_eq!(users.admit(wrong.clone()).await, None, "{wrong:?}");
            }
            let worker = User::Named("gw1".into(), Role::Worker);
            assert_eq!(users.admit(Some(login("gw1", "right"))).await, Some(worker));
        }
    }

    #[tokio::test]
    async fn without_users_everybody_is_let_in() {
        let users = Users::new(&BTreeMap::new()).unwrap();
        assert_eq!(users.admit(None).await, Some(User::Anyone));
        assert_eq!(users.admit(Some(login("x", "y"))).await, Some(User::Anyone));
    }

    #[tokio::test]
    async fn a_password_that_was_right_waits_for_nobody() {
        let users = users();
        assert!(users.admit(Some(login("gw1", "right"))).await.is_some());
        let _all = users.verifying.acquire_many(2).await.unwrap();
        assert!(users.admit(Some(login("gw1", "right"))).await.is_some());
        let waits = tokio::time::timeout(Duration::from_millis(100), users.admit(Some(login("gw1", "wrong")))).await;
        assert!(waits.is_err(), "strangers wait for their turn");
    }

    #[test]
    fn a_workers_clients_have_its_name_and_nobody_elses_are_the_same() {
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
        assert_eq!(users.admit(Some(login(OWN, credentials.password.expose()))).await, Some(own));
        let wrong = [(OWN, ""), (OWN, "right"), ("", credentials.password.expose())];
        for wrong in wrong.map(|(name, password)| Some(login(name, password))).into_iter().chain([None]) {
            assert_eq!(users.admit(wrong).await, None);
        }
        assert_ne!(Users::own().unwrap().1, credentials);
    }

    #[test]
    fn what_is_no_hash_is_refused_with_its_key() {
        let user = MqttUser { password_hash: Secret::new("$argon2id$".into()), role: Role::Worker };
        let error = Users::new(&BTreeMap::from([("gw1".to_owned(), user)])).err().unwrap();
        assert!(error.to_string().contains("mqtt_listen.users.gw1.password_hash"), "{error:#}");
    }
}
