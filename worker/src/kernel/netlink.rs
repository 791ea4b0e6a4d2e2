//! Linux: WireGuard by wireguard-control, routes, flood lists, links and addresses by rtnetlink.
