//! The clients that the embedded server had trouble with, for operators: those that it refused lately, and client ids
//! that two programs use. Clones share it; each connection adds to it, the status reads it.

use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

use crate::mqtt_server::handshake::RefusedConnection;
use crate::mqtt_server::refused_clients::{RefusedClient, RefusedClients};
use crate::mqtt_server::takeovers::Takeovers;

/// The clients; none where another MQTT server is used.
#[derive(Debug, Clone, Default)]
pub struct ClientProblems(Arc<Mutex<ClientProblemsState>>);

#[derive(Debug, Default)]
struct ClientProblemsState {
    refused: RefusedClients,
    takeovers: Takeovers,
}

impl ClientProblems {
    /// A connection was refused.
    pub(super) fn on_refused(&self, refused: &RefusedConnection, now: Instant) {
        self.0.lock().refused.on_refused(refused, now);
    }

    /// A client, known by its user and its id, has connected while it was connected. True if that is to be logged.
    pub(super) fn on_takeover(&self, client: &str, now: Instant) -> bool {
        self.0.lock().takeovers.on_takeover(client, now)
    }

    /// The clients that were refused last, the newest first.
    #[must_use]
    pub fn refused(&self, now: Instant) -> Vec<RefusedClient> {
        self.0.lock().refused.list(now)
    }

    /// The client ids that two programs use.
    #[must_use]
    pub fn ids_in_use(&self, now: Instant) -> Vec<String> {
        self.0.lock().takeovers.in_use(now)
    }
}
