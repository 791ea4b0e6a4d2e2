//! Why a WebSocket is closed: the code and the reason that its client gets.

use std::time::Duration;

use actix_ws::{CloseCode, CloseReason};
use strum::{IntoStaticStr, VariantNames};
use wgkex_common::http::MESSAGE_MAX;

use crate::tenants::message::JoinMessageError;

/// How long a client may take to join.
pub const JOIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Why the broker closes a WebSocket.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, IntoStaticStr, VariantNames)]
#[strum(serialize_all = "snake_case")]
pub enum CloseCause {
    /// No first message was received in time.
    #[error("no join within {} s", JOIN_TIMEOUT.as_secs())]
    JoinTimeout,
    /// The first message is not a text.
    #[error("the first message has to be a text")]
    Binary,
    /// A text is not UTF-8.
    #[error("a text has to be UTF-8")]
    NotUtf8,
    /// The first message is not a join.
    #[error("{0}")]
    Join(JoinMessageError),
    /// A member that is alive has the key.
    #[error("a member has this public_key and is connected")]
    KeyInUse,
    /// All addresses of the tenant's network are taken.
    #[error("all addresses of this tenant are taken")]
    NoAddress,
    /// All networks are taken.
    #[error("all networks are taken by other tenants")]
    NoNetwork,
    /// Its client has members in too many other tenants.
    #[error("this client address has members in as many other tenants as one may")]
    TooManyTenants,
    /// Another member got its address while brokers did not reach each other.
    #[error("another member has this address now: join again")]
    Conflict,
    /// It has neither an address nor a refusal: no broker gives addresses, or members with its key were asked one after the other.
    #[error("no address was given in time: join again")]
    Late,
    /// A message is too large.
    #[error("a message has at most {MESSAGE_MAX} bytes")]
    TooLarge,
    /// Frames that are against RFC 6455.
    #[error("not the WebSocket protocol: {0}")]
    Protocol(String),
    /// The broker stops.
    #[error("the broker stops")]
    Stopping,
    /// The member does not read its messages, and would not receive a reason either.
    #[error("the member does not read")]
    Slow,
    /// The member does not answer, and would not get a reason either.
    #[error("the member does not answer")]
    Silent,
}

impl CloseCause {
    /// Its label in metrics.
    pub fn label(&self) -> &'static str {
        self.into()
    }

    /// The content of the close frame; none for a client that would not receive it.
    pub fn reason(&self) -> Option<CloseReason> {
        let code = match self {
            Self::Slow | Self::Silent => return None,
            Self::Binary | Self::NotUtf8 | Self::Join(JoinMessageError::Malformed(_)) => CloseCode::Unsupported,
            Self::JoinTimeout
            | Self::Join(JoinMessageError::LongName | JoinMessageError::Key(_))
            | Self::KeyInUse
            | Self::TooManyTenants => CloseCode::Policy,
            Self::NoAddress | Self::NoNetwork | Self::Conflict | Self::Late => CloseCode::Again,
            Self::TooLarge => CloseCode::Size,
            Self::Protocol(_) => CloseCode::Protocol,
            Self::Stopping => CloseCode::Away,
        };
        Some(CloseReason { code, description: Some(self.to_string()) })
    }
}
