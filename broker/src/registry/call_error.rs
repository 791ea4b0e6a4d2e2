//! Why a call of the registry is not done: from the [`store`](super::store) to the answer of the routes.

use strum::IntoStaticStr;
use wgkex_common::BrokerName;

use crate::database::DatabaseError;

/// Why a call was not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// The content of the registry does not allow it.
    #[error(transparent)]
    Refused(#[from] CallRefusal),
    /// The database cannot be used.
    #[error(transparent)]
    Database(#[from] DatabaseError),
    /// Another broker has the registry.
    #[error("broker {0} has the registry of this bus, and with SQLite only one can have it")]
    Elsewhere(BrokerName),
}

/// Why a call is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum CallRefusal {
    /// There is no such server.
    #[error("there is no server of this name")]
    UnknownServer,
    /// The client has no address at this server.
    #[error("this client has no lease at this server, or another key there")]
    UnknownPeering,
    /// There is a server of this name.
    #[error("there is a server of this name already")]
    NameTaken,
    /// Another client, or a server, has this key.
    #[error("another client or a server has this key")]
    KeyTaken,
    /// A worker announces another network than the one that its clients have leases of.
    #[error("the server's clients have leases of another network, or with other reserved addresses: delete it first")]
    NetworkChanged,
    /// A server's network has some of these addresses.
    #[error("the network overlaps with that of another server")]
    NetworkTaken,
    /// The address that a client is to have is none that clients of the server get.
    #[error("clients of this server get no such address")]
    NoLease,
    /// The address that a client is to have is not free, or the client has another one.
    #[error("another client has this address, or this client has another one")]
    LeaseTaken,
    /// The server has no address left.
    #[error("the server has no free address")]
    Exhausted,
}
