//! SIGHUP, by which an operator makes a program read its files again.

use std::future::pending;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// The SIGHUPs that this program gets from now on.
#[derive(Debug)]
pub struct Hangups(Option<Signal>);

impl Hangups {
    /// Begins to receive SIGHUP, which no longer ends the program.
    #[must_use]
    pub fn listen() -> Self {
        Self(signal(SignalKind::hangup()).ok())
    }

    /// Returns at each one; never if the signal cannot be received. Cancel-safe.
    pub async fn next(&mut self) {
        if let Some(signal) = &mut self.0
            && signal.recv().await.is_some()
        {
            return;
        }
        pending::<()>().await;
    }
}
