//! The clients that were refused last, for operators: a bounded number, without addresses. No IO, no clock.

use std::collections::VecDeque;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::mqtt_server::handshake::RefusedConnection;

/// The most that are remembered of users of the config, and of strangers.
const REFUSED_CLIENTS_MAX: usize = 10;

/// A client that was refused, once or more often for the same cause.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedClient {
    /// The user name that it gave.
    pub user: Option<String>,
    /// The client id that it gave.
    pub client: Option<String>,
    /// The reason, as the metric has it.
    pub reason: String,
    /// The reason in words, about the client.
    pub cause: String,
    /// How often.
    pub count: u64,
    /// How many seconds ago it was refused last.
    pub last_secs: u64,
}

/// The clients that were refused last.
#[derive(Debug, Default)]
pub(super) struct RefusedClients {
    users: Recent,
    /// Apart, so that they replace none of users.
    strangers: Recent,
}

/// The one that was refused last is the last.
#[derive(Debug, Default)]
struct Recent(VecDeque<RecentRefusal>);

#[derive(Debug)]
struct RecentRefusal {
    /// As of `last`.
    client: RefusedClient,
    last: Instant,
}

impl RefusedClients {
    /// A connection was refused. Those that strangers make everywhere are left out.
    pub(super) fn on_refused(&mut self, refused: &RefusedConnection, now: Instant) {
        if !refused.is_noise() {
            if refused.is_user { &mut self.users } else { &mut self.strangers }.add(refused, now);
        }
    }

    /// All of them, the newest first.
    pub(super) fn list(&self, now: Instant) -> Vec<RefusedClient> {
        let mut all: Vec<_> = self.users.0.iter().chain(&self.strangers.0).collect();
        all.sort_by_key(|entry| std::cmp::Reverse(entry.last));
        let aged = |entry: &RecentRefusal| RefusedClient {
            last_secs: now.saturating_duration_since(entry.last).as_secs(),
            ..entry.client.clone()
        };
        all.into_iter().map(aged).collect()
    }
}

impl Recent {
    fn add(&mut self, RefusedConnection { refusal, user, client_id, cause, .. }: &RefusedConnection, now: Instant) {
        let mut client = RefusedClient {
            user: user.clone(),
            client: client_id.clone(),
            reason: refusal.reason().to_owned(),
            cause: cause.clone().into_owned(),
            count: 1,
            last_secs: 0,
        };
        let is_same = |entry: &RecentRefusal| RefusedClient { count: client.count, ..entry.client.clone() } == client;
        if let Some(before) = self.0.iter().position(is_same).and_then(|at| self.0.remove(at)) {
            client.count = before.client.count.saturating_add(1);
        } else if self.0.len() >= REFUSED_CLIENTS_MAX {
            self.0.pop_front();
        }
        self.0.push_back(RecentRefusal { client, last: now });
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::mqtt_server::handshake::ConnectRefusal;

    fn refused(user: &str, is_user: bool) -> RefusedConnection {
        RefusedConnection {
            is_user,
            user: Some(user.into()),
            client_id: Some("id".into()),
            ..RefusedConnection::from(ConnectRefusal::Password)
        }
    }

    #[test]
    fn the_last_ones_are_shown_and_strangers_replace_no_user() {
        let (mut clients, begun) = (RefusedClients::default(), Instant::now());
        let at = |seconds| begun + Duration::from_secs(seconds);
        for second in 0..3 {
            clients.on_refused(&refused("gw1", true), at(second));
        }
        for n in 0..1_000 {
            clients.on_refused(&refused(&format!("stranger-{n}"), false), at(3 + n));
        }
        clients.on_refused(&ConnectRefusal::Protocol.into(), at(2_000));
        let shown = clients.list(at(1_002));
        assert_eq!(shown.len(), 1 + REFUSED_CLIENTS_MAX);
        assert_eq!(shown[0].user.as_deref(), Some("stranger-999"));
        let expected = RefusedClient {
            user: Some("gw1".into()),
            client: Some("id".into()),
            reason: "password".into(),
            cause: "wrong password".into(),
            count: 3,
            last_secs: 1_000,
        };
        assert_eq!(shown[REFUSED_CLIENTS_MAX], expected);
        clients.on_refused(&RefusedConnection { refusal: ConnectRefusal::ClientId, ..refused("gw1", true) }, at(1_003));
        assert_eq!(clients.list(at(1_003)).len(), 2 + REFUSED_CLIENTS_MAX, "another reason is another line");
    }
}
